"""Examples -> token ids and loss weights. The only place that decides which tokens are trained on.

The whole text is tokenised once, so that the ids are those of ``apply_chat_template(tokenize=True)``; spans of
characters become spans of tokens through the tokenizer's offsets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from rayft.config.data import Data
from rayft.data.formats import Example
from rayft.data.turns import ChatTemplate
from rayft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """One example as the model sees it, L tokens, not truncated.

    ``ids`` int32[L]; ``weights`` float32[L], 0 = not trained on, always 0 for the first token, which nothing predicts;
    ``supervised`` bool[L]: trained on by ``train_on``, without regard to ``prompt_loss_weight``; ``answer``: tokens
    [start, end) of the last assistant turn, None where there is none.
    """

    ids: np.ndarray
    weights: np.ndarray
    supervised: np.ndarray
    answer: tuple[int, int] | None


class _Span(NamedTuple):
    start: int
    end: int
    weight: float
    supervised: bool


@dataclass
class _Text:
    """Text with spans of characters, of which later ones win. ``raw``: no template wrote it, so it gets BOS and EOS."""

    text: str
    spans: list[_Span]
    answer: tuple[int, int] | None = None
    raw: bool = False


def chat_template(data: Data) -> str | None:
    """The text of `data.chat_template`, read if it names a file; None for the tokenizer's own.

    Raises UsageError R209 when it looks like a path and nothing is there.
    """
    given = data.chat_template
    if given is None or "{" in given or "\n" in given:
        return given
    path = Path(os.path.expanduser(given))
    if not path.is_file():
        raise UsageError("R209", f"data.chat_template: {given}: no such file", "give Jinja text or the path of a file")
    return path.read_text(encoding="utf-8")


class Renderer:
    """Renders examples for one tokenizer, chat template and objective."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, data: Data, objective: Literal["sft", "clm"] = "sft"
    ) -> None:
        """Raises UsageError R209 (chat template missing) or R212 (tokenizer without offsets)."""
        if not tokenizer.is_fast:
            raise UsageError(
                "R212",
                f"{tokenizer.name_or_path}: the tokenizer gives no character offsets (it is not a fast tokenizer)",
                "use a model folder with a tokenizer.json",
            )
        self._tokenizer = tokenizer
        self._data = data
        self._objective = objective
        self._everything = objective == "clm" or data.train_on == "all"
        own = chat_template(data)
        has_template = own is not None or tokenizer.chat_template is not None
        self._template = ChatTemplate(tokenizer, own, data.chat_template_kwargs) if has_template else None

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The examples in their order. Raises UsageError R209 to R211 with the place of the row."""
        texts = [self._text(example) for example in examples]
        rendered: dict[int, Rendered] = {}
        for raw in (False, True):
            chosen = [index for index, text in enumerate(texts) if text.raw is raw]
            if not chosen:
                continue
            encoded = self._tokenizer(
                [texts[index].text for index in chosen],
                add_special_tokens=raw,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for index, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                rendered[index] = self._weigh(texts[index], ids, offsets)
        return [rendered[index] for index in range(len(texts))]

    def _text(self, example: Example) -> _Text:
        if example.text is not None:
            return _Text(example.text, [_Span(0, len(example.text), 1.0, True)], raw=True)
        if self._template is not None:
            try:
                return self._chat(example, self._template)
            except UsageError as error:
                raise UsageError(error.id, f"{example.where}: {error.message}", error.hint) from error
        if example.prompt is None or example.completion is None:
            raise UsageError(
                "R209",
                f"{example.where}: the tokenizer has no chat template, so a conversation cannot be rendered",
                "set data.chat_template, take an instruction-tuned base, or give prompt and completion as plain texts",
            )
        whole = example.prompt + example.completion
        answer = (len(example.prompt), len(whole))
        start = 0 if self._everything else answer[0]
        return _Text(whole, [_Span(start, len(whole), 1.0, True)], answer, raw=True)

    def _chat(self, example: Example, template: ChatTemplate) -> _Text:
        messages, tools = example.messages or [], example.tools
        whole = template.text(messages, tools)
        everything = [_Span(0, len(whole), 1.0, True)]
        if self._objective == "clm":
            return _Text(whole, everything)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [index for index in turns if index >= example.context]
        if self._data.train_on == "last_assistant":
            trained = trained[-1:]
        at = {index: template.turn(messages, tools, index, whole) for index in {*trained, *turns[-1:]}}
        spans = everything if self._everything else [_Span(*at[index], 1.0, True) for index in trained]
        otherwise = 1.0 if self._everything else self._data.prompt_loss_weight
        for index, message in enumerate(messages):
            if (own := message.get("weight")) is None:
                continue
            if index in trained:
                spans.append(_Span(*at[index], own, own > 0))
            elif otherwise:
                span = at.get(index) or template.message(messages, tools, index, whole)
                spans.append(_Span(*span, own * otherwise, self._everything and own > 0))
        return _Text(whole, spans, at[turns[-1]] if turns else None)

    def _weigh(self, text: _Text, ids: list[int], offsets: list[tuple[int, int]]) -> Rendered:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if text.raw:
            if bos is not None and ids[:2] == [bos, bos]:  # the text brings the BOS that the tokenizer adds
                ids, offsets = ids[1:], offsets[1:]
            if eos is not None and ids[-1:] != [eos]:
                ids, offsets = [*ids, eos], [*offsets, (len(text.text), len(text.text))]
        starts, ends = _characters(offsets)
        weights = np.full(len(ids), self._data.prompt_loss_weight, np.float32)
        supervised = np.zeros(len(ids), bool)
        for span in text.spans:
            inside = (starts < span.end) & (ends > span.start)
            if text.raw and eos is not None:
                inside[-1] = True
            weights[inside], supervised[inside] = span.weight, span.supervised
        weights[:1], supervised[:1] = 0, False
        answer = None
        if text.answer is not None:
            found = np.flatnonzero((starts < text.answer[1]) & (ends > text.answer[0]))
            answer = (int(found[0]), int(found[-1]) + 1) if len(found) else None
        return Rendered(np.array(ids, np.int32), weights, supervised, answer)


def _characters(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Characters [start, end) of each token, int64[L] each, at least one wide.

    Byte-level tokenizers leave the space before a word out of the word's offsets, and report a run of spaces as empty;
    what lies between two tokens belongs to the second.
    """
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = spans[:, 0], spans[:, 1]
    reached = np.maximum.accumulate(ends)
    starts = np.minimum(starts, np.concatenate([[0], reached[:-1]]))
    return starts, np.maximum(ends, starts + 1)
