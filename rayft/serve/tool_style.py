"""How a chat template writes tool calls.

No template is read: it is run on a call with words that occur nowhere else, and what stands around them is the style.
Known to work for Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama 3 (a JSON object with `parameters`), Mistral
(`[TOOL_CALLS] [...]`), the markup of `rayft.serve.tool_markup` and what resembles them. Anything else gets the plain
form: see `rayft.serve.plain_tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rayft.serve.tool_markup import KEYS, VALUES, Markup, learnt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the code of a template raises on a conversation that it was not written for, or when it leaves its sandbox."""

_NAME, _RESULT = "rayftfunction", "rayftresult"
_ARGUMENTS = dict(zip(KEYS, VALUES, strict=True))
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A function.",
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": "A text."} for key in KEYS},
        },
    },
}
_CALL = {"id": "rayft0000", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_QUESTION = {"role": "user", "content": "question"}
_ANSWER = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_OUTCOME = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": "rayft0000"}


@dataclass(frozen=True)
class ToolStyle:
    """What a model writes: ``begin``, ``lead``, a JSON object or markup, ``tail``, ``end``."""

    begin: str = ""
    """`<tool_call>`; empty = the answer is the call from its first character on."""
    end: str = ""
    lead: str = ""
    """Blanks between ``begin`` and the JSON, and the same before ``end``."""
    tail: str = ""
    name: str = "name"
    """Key of the function's name."""
    arguments: str = "arguments"
    markup: Markup | None = None
    """None = JSON."""
    listed: bool = False
    """Whether all calls of an answer stand in one JSON list."""
    begin_id: int | None = None
    """Where ``begin`` is a special token, which the text of an answer leaves out."""
    native: bool = False
    """Whether the template itself writes tools, calls and results; else they are put into plain messages."""

    @property
    def mark(self) -> str:
        """What announces a call in the text of an answer."""
        return "" if self.begin_id is not None else self.begin


PLAIN = ToolStyle()
"""`{"name": ..., "arguments": {...}}` and nothing else."""


def tool_style(tokenizer: PreTrainedTokenizerBase) -> ToolStyle:
    """The style of a tokenizer's chat template; `PLAIN` where it has none that is understood."""
    prompted = _attempt(tokenizer, [_QUESTION], True)
    called = _attempt(tokenizer, [_QUESTION, _ANSWER], False)
    answered = _attempt(tokenizer, [_QUESTION, _ANSWER, _OUTCOME], True)
    if prompted is None or called is None or answered is None:
        return PLAIN
    if _NAME not in prompted or _RESULT not in answered:
        return PLAIN
    whole = called.startswith(prompted)
    turn = called[len(prompted) :] if whole else called
    found = _object(turn)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if found is None:
        return _markup(turn, special)
    start, end, name, arguments = found
    before, after = turn[:start], turn[end:]
    listed = before.rstrip().endswith("[") and after.lstrip().startswith("]")
    if listed:
        before, after = before.rstrip()[:-1], after.lstrip()[1:]
    begin, lead = _begin(before, whole)
    tail, closing = _end(after, special)
    begin_id = tokenizer.convert_tokens_to_ids(begin) if begin in special else None
    return ToolStyle(begin, closing, lead, tail, name, arguments, None, listed, begin_id, native=True)


def _markup(turn: str, special: set[str]) -> ToolStyle:
    """`PLAIN` where the call is no markup, or has special tokens in it, which the text of an answer leaves out."""
    before, _, after = turn.rpartition(_NAME)
    found = learnt(before, _until(after, special))
    if found is None or found[0] in special:
        return PLAIN
    begin, lead, markup, end = found
    return ToolStyle(begin, end, lead, markup=markup, native=True)


def _attempt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], prompt: bool) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=[_TOOL], tokenize=False, add_generation_prompt=prompt
        )
    except REFUSALS:
        return None
    return text


def _object(turn: str) -> tuple[int, int, str, str] | None:
    """(start, end, key of the name, key of the arguments) of the last JSON object in a text that is the call."""
    decoder = json.JSONDecoder()
    for match in reversed(list(re.finditer(r"\{", turn))):
        try:
            value, end = decoder.raw_decode(turn, match.start())
        except ValueError:
            continue
        names = [key for key, item in value.items() if item == _NAME]
        arguments = [key for key, item in value.items() if item in (_ARGUMENTS, json.dumps(_ARGUMENTS))]
        if names and arguments:
            return match.start(), end, names[0], arguments[0]
    return None


def _begin(before: str, whole: bool) -> tuple[str, str]:
    """(what announces the call, blanks after it). whole: whether nothing precedes it but what the model writes."""
    word = before.rstrip()
    word = word.split()[-1] if word else ""
    known = re.search(r"<tool_call>|\[TOOL_CALLS\]", word)
    if not whole or word.startswith("</"):  # a header, or the end of an empty thinking block
        word = known.group() if known else ""
    return word, before[len(before.rstrip()) :] if word else ""


def _end(after: str, special: set[str]) -> tuple[str, str]:
    """(blanks after the JSON, what closes the call)."""
    closing = _until(after, special).strip()
    return (after[: len(after) - len(after.lstrip())], closing) if closing else ("", "")


def _until(text: str, special: set[str]) -> str:
    """The text before the first special token."""
    return text[: min((at for at in map(text.find, special) if at >= 0), default=len(text))]
