"""From the text of an answer to content and tool calls, piece by piece."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from rayft.serve.job import ToolCall
from rayft.serve.tool_markup import typed
from rayft.serve.tool_style import ToolStyle

_ALPHABET = string.ascii_letters + string.digits
_SEPARATORS = " \t\r\n;,"
"""What models write between calls."""


class ToolParser:
    """`push` the pieces of one answer, then `finish`. Text is content until a call begins; from there on it is held
    back until the call is complete. What turns out to be no call of a known function comes out as content.

    Calls stand behind the style's mark wherever it occurs, and without it at the beginning of an answer. The outcome
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, style: ToolStyle, tools: Sequence[Mapping[str, Any]]) -> None:
        """tools: OpenAI's."""
        self.style = style
        self._parameters: dict[str, Mapping[str, Any]] = {
            tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools
        }
        self._held = ""
        self._value: _JsonEnd | _MarkEnd | None = None
        """The JSON or markup of the call that has begun."""
        self._fresh = True
        """Nothing but blanks and calls came so far: a call may begin without its mark."""
        self._called = False
        """Nothing but separators came since a call."""
        self._closing = False
        """The mark at the end of a call is expected."""

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """(content, calls) that are certain now."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest: a call that was never completed is content."""
        content, calls = self._run(final=True)
        rest, self._held = self._held, ""
        return content + ("" if self._called and not rest.strip() else rest), calls

    def _run(self, final: bool) -> tuple[str, tuple[ToolCall, ...]]:
        content: list[str] = []
        calls: list[ToolCall] = []
        while self._in_call(content, calls, final) if self._value else self._outside(content, final):
            pass
        return "".join(content), tuple(calls)

    def _in_call(self, content: list[str], calls: list[ToolCall], final: bool) -> bool:
        """Whether there is more to do; so does `_outside`."""
        assert self._value is not None
        value, end = self._value, self._value.find(self._held)
        if end is None and not final:
            return False
        start = value.start
        if isinstance(value, _MarkEnd):
            found = self._marked(self._held[start:end], whole=end is not None)
        else:
            found = self._calls(self._held[start:end]) if end is not None else []
        self._value = None
        if not found:  # the bracket was one like others, and a call may stand behind it
            self._give(content, start + 1)
            return True
        calls.extend(found)
        self._held = "" if end is None else self._held[end:]
        self._called, self._closing = True, bool(self.style.end)
        return True

    def _outside(self, content: list[str], final: bool) -> bool:
        mark, rest = self.style.mark, self._held.lstrip()
        if self._closing:
            if rest.startswith(self.style.end):
                self._held, self._closing = rest[len(self.style.end) :], False
                return True
            if self.style.end.startswith(rest) and not final:
                return False
            self._closing = False
        if self._fresh or self._called:
            rest = self._held.lstrip(_SEPARATORS if self._called else None)
            if not rest:
                return False
            if mark and mark.startswith(rest[: len(mark)]):
                if len(rest) < len(mark) and not final:
                    return False
            elif rest[0] in "{[":
                return self._begin(_JsonEnd(len(self._held) - len(rest)))
        at = self._held.find(mark) if mark else -1
        if at < 0:
            kept = 0 if final or not mark else _overlap(self._held, mark)
            self._give(content, len(self._held) - kept, keep_blanks=kept > 0)
            return False
        blank = not self._held[:at].strip(_SEPARATORS if self._called else None)
        if at and not (blank and (self._fresh or self._called)):
            self._give(content, at)
            return True
        inside = self._held[at + len(mark) :].lstrip()
        if not inside and not final:
            return False
        if inside[:1] in ("{", "["):
            return self._begin(_JsonEnd(len(self._held) - len(inside)))
        if self.style.markup is not None:
            opening = self.style.markup.opening
            if inside.startswith(opening):
                return self._begin(_MarkEnd(len(self._held) - len(inside), self.style.end))
            if opening.startswith(inside) and not final:
                return False
        self._give(content, at + len(mark))
        return True

    def _begin(self, value: _JsonEnd | _MarkEnd) -> bool:
        self._value = value
        return True

    def _give(self, content: list[str], count: int, keep_blanks: bool = False) -> None:
        """The first characters that are held are content; blanks before what may be a mark may belong to a call."""
        text = self._held[:count]
        if keep_blanks and (self._fresh or self._called) and not text.strip(_SEPARATORS if self._called else None):
            return
        if text:
            content.append(text)
            self._held = self._held[count:]
            self._fresh = self._called = False

    def _calls(self, text: str) -> list[ToolCall]:
        """Those that a JSON text consists of; none where one of them is no call."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [self._call(item) for item in (value if isinstance(value, list) else [value])]
        return [] if None in found else [call for call in found if call is not None]

    def _marked(self, text: str, whole: bool) -> list[ToolCall]:
        """Those that are written as markup; of an answer that ends before its mark does, only where each is closed."""
        markup = self.style.markup
        if markup is None or not (whole or markup.closing):
            return []
        calls = []
        for name, written in markup.calls(text):
            if name not in self._parameters:
                return []
            root = self._parameters[name]
            schemas = root.get("properties")
            schemas = schemas if isinstance(schemas, Mapping) else {}
            arguments = {key: typed(value, schemas.get(key), root) for key, value in written.items()}
            calls.append(ToolCall(call_id(), name, json.dumps(arguments, ensure_ascii=False)))
        return calls

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        if isinstance(value.get("function"), dict):
            value = value["function"]
        keys = (self.style.arguments, "arguments", "parameters")
        names = [value[key] for key in (self.style.name, "name", "tool") if key in value]
        arguments: Any = next((value[key] for key in keys if key in value), {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not names or not isinstance(names[0], str) or names[0] not in self._parameters:
            return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(call_id(), names[0], json.dumps(arguments, ensure_ascii=False))


def call_id() -> str:
    """Nine letters and digits: the templates of Mistral refuse any other form."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` the mark begins with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


class _JsonEnd:
    """Where the brackets of a JSON value that begins at ``start`` are closed; reads each character once."""

    def __init__(self, start: int) -> None:
        self.start = self._at = start
        self._depth = 0
        self._quoted = self._escaped = False

    def find(self, text: str) -> int | None:
        """The end, None if it has not come. ``text`` is that of the call before, or a longer one."""
        for at in range(self._at, len(text)):
            character = text[at]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._quoted, self._escaped = character != '"', character == "\\"
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        self._at = len(text)
        return None


class _MarkEnd:
    """Where the markup that begins at ``start`` meets the mark at the end of a call; reads each character once."""

    def __init__(self, start: int, mark: str) -> None:
        self.start = self._at = start
        self._mark = mark

    def find(self, text: str) -> int | None:
        """As `_JsonEnd.find`."""
        end = text.find(self._mark, self._at)
        self._at = max(self.start, len(text) - len(self._mark) + 1)
        return end if end >= 0 else None
