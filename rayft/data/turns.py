"""Where each assistant turn begins and ends in a rendered conversation, for any chat template.

No template is read or understood: it is only run on chosen conversations and the results are compared.

* **Prefixes.** The text of the messages before a turn, with the generation prompt, ends where the turn begins; the text
  of the messages up to and with it ends where the turn ends. This holds for most templates and most turns.
* **Stand-ins.** Some templates rewrite history (Qwen3 drops the thinking of earlier turns), so that the shorter
  conversation is not a prefix of the longer one. Then the turn is replaced by a unique word in the whole conversation:
  what stands after the word in that text also stands after the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rayft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

STAND_IN = "rayftstandin"
# What a template's own code raises on a conversation that it was not written for.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_EMPTY_THINKING = re.compile(r"\s*<(\w+)>\s*</\1>\s*")
_OPEN_THINKING = re.compile(r"<(\w+)>\s*(</\1>\s*)?$")


class ChatTemplate:
    """A chat template with its arguments: renders conversations and finds the assistant turns in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, arguments: dict[str, Any]) -> None:
        """``template`` None takes the tokenizer's own."""
        self._tokenizer = tokenizer
        self._template = template
        self._arguments = arguments
        specials = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = "|".join(specials) or "(?!)"
        self._header, self._lead, self._close, self._rest = self._probe()
        opened = _OPEN_THINKING.search(self._header)
        empty = _EMPTY_THINKING.fullmatch((opened.group() if opened else "") + self._lead)
        self._inserted = self._lead if self._lead.strip() and (empty or not self._header) else ""

    def text(self, messages: Sequence[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        """The conversation as text. Raises UsageError R210 when the template refuses it."""
        try:
            return self._render(messages, tools, generation_prompt)
        except _REFUSALS as error:
            raise UsageError(
                "R210",
                f"the chat template refuses the conversation: {type(error).__name__}: {error}",
                "some templates want user and assistant to take turns, or know no system or tool messages;"
                " change the data or set data.chat_template",
            ) from error

    def turn(self, messages: Sequence[Message], tools: Tools, index: int, text: str) -> tuple[int, int]:
        """Characters [start, end) of ``text`` (the whole conversation) that the model itself writes in turn ``index``.

        From the end of the generation prompt to the end of the end-of-turn token: without the header, without an empty
        thinking block that the template puts in, without what follows the end-of-turn token.
        Raises UsageError R211 when they cannot be found.
        """
        prompted = self._attempt(messages[:index], tools, generation_prompt=True)
        upto = self._attempt(messages[: index + 1], tools)
        start = len(prompted) if prompted is not None and text.startswith(prompted) else None
        end = None
        if start is not None and upto is not None and text.startswith(upto):
            end = start + self._closed(upto[start:])
        if start is None or end is None:
            other_start, other_end = self._through_stand_in(messages, tools, index, text)
            start = other_start if start is None else start
            end = other_end if end is None else end
        if start is None or end is None or start > end:
            raise UsageError(
                "R211",
                f"assistant turn {index + 1} cannot be located in the text of the chat template {self._name()}",
                "set data.chat_template to a template that does not rewrite earlier turns, or train with train_on: all",
            )
        return self._after_inserted(messages[index], text, start), end

    def message(self, messages: Sequence[Message], tools: Tools, index: int, text: str) -> tuple[int, int]:
        """Characters [start, end) of ``text`` that message ``index`` adds, header and all. Raises UsageError R211."""
        begin = self._attempt(messages[:index], tools) if index else ""
        end = self._attempt(messages[: index + 1], tools)
        if begin is None or end is None or not end.startswith(begin) or not text.startswith(end):
            raise UsageError("R211", f"message {index + 1} cannot be located in the text of {self._name()}")
        return len(begin), len(end)

    def _render(self, messages: Sequence[Message], tools: Tools, generation_prompt: bool) -> str:
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        return self._tokenizer.apply_chat_template(
            plain,
            tools=tools,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **self._arguments,
        )

    def _attempt(self, messages: Sequence[Message], tools: Tools, generation_prompt: bool = False) -> str | None:
        """Like `text`, None where the template refuses: a conversation cut short need not make sense to it."""
        try:
            return self._render(messages, tools, generation_prompt)
        except _REFUSALS:
            return None

    def _probe(self) -> tuple[str, str, str, str]:
        """On one plain exchange: the generation prompt, what stands between it and the answer, what closes the turn,
        and what the template writes after that."""
        question = [{"role": "user", "content": "question"}]
        whole = self._attempt([*question, {"role": "assistant", "content": STAND_IN}], None)
        asked, prompted = self._attempt(question, None), self._attempt(question, None, generation_prompt=True)
        if whole is None or asked is None or prompted is None or STAND_IN not in whole:
            return "", "", "", ""
        head, _, tail = whole.partition(STAND_IN)
        header = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
        lead = head.removeprefix(prompted) if head.startswith(prompted) else ""
        close = self._closing(tail)
        return header, lead, close, tail[len(close) :]

    def _closing(self, tail: str) -> str:
        """The end of a turn, given what follows its text: up to the first special token, else all that is not blank."""
        special = re.match(rf"\s*(?:{self._special})", tail)
        return special.group() if special else tail.rstrip() or tail

    def _closed(self, turn: str) -> int:
        """The length of ``turn`` without what follows its end-of-turn token, such as ChatML's newline."""
        if self._close and turn.endswith(self._close + self._rest):
            return len(turn) - len(self._rest)
        special = re.search(rf"(?:{self._special})(?=\s*$)", turn)
        return special.end() if special else len(turn)

    def _through_stand_in(
        self, messages: Sequence[Message], tools: Tools, index: int, text: str
    ) -> tuple[int | None, int | None]:
        word = STAND_IN
        while word in text:
            word += "x"
        stand_in = {"role": "assistant", "content": word}
        other = self._attempt([*messages[:index], stand_in, *messages[index + 1 :]], tools)
        if other is None or other.count(word) != 1:
            return None, None
        head, _, tail = other.partition(word)
        head = head.removesuffix(self._lead)
        close = self._close if tail.startswith(self._close) else self._closing(tail)
        start = len(head) if text.startswith(head) else None
        end = len(text) - len(tail) + len(close) if text.endswith(tail) else None
        return start, end

    def _after_inserted(self, message: Message, text: str, start: int) -> int:
        """``start`` after what the template itself writes before every answer: an empty thinking block, or the header
        of a template that knows no generation prompt."""
        if text.startswith(self._inserted, start) and not _EMPTY_THINKING.match(message["content"]):
            return start + len(self._inserted)
        return start

    def _name(self) -> str:
        return repr(str(self._template or self._tokenizer.chat_template)[:80])
