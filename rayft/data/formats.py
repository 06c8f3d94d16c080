"""Rows of the known formats -> one small `Example`: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from rayft.config.data import Source
from rayft.data.messages import BadRow, as_messages, as_tools, text
from rayft.data.sources import Row
from rayft.errors import UsageError

Message = dict[str, Any]

REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Format -> the columns that it needs, in the order in which `auto` looks for them."""
NAMES = (*(name for names in REQUIRED.values() for name in names), "tools", "system", "input")
ALIASES = {"response": "completion"}


@dataclass(frozen=True)
class Example:
    """What a row says, before any template. ``where`` names the row in messages.

    ``messages`` (with ``tools``) is the conversation, of which the first ``context`` messages are given and never
    trained on as assistant turns. ``prompt`` and ``completion`` are the same as plain texts, where the format has
    them: they are used with a tokenizer that has no chat template. ``text`` is raw text.
    """

    where: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    context: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


class Format:
    """How the rows of one source are read: which format, and where each of its columns comes from."""

    def __init__(self, source: Source, columns: Collection[str]) -> None:
        """``columns``: the column names that the rows have. Raises UsageError R206 or R207."""
        self._source = source
        self._columns = sorted(columns)
        mapped = {ALIASES.get(name, name): self._getter(name, place) for name, place in source.columns.items()}
        native = {ALIASES.get(name, name): _column(name) for name in columns if ALIASES.get(name, name) in NAMES}
        self._get = native | mapped
        # What the user mapped decides before what the rows happen to have besides.
        self.name = source.format if source.format != "auto" else _detect(mapped) or _detect(self._get)
        missing = [name for name in REQUIRED.get(self.name or "", ()) if name not in self._get]
        if self.name is None or missing:
            raise self._no_format(missing)

    def example(self, row: Row) -> Example:
        """The row in this format. Raises UsageError R208 with the row's place and the reason."""
        try:
            values = {name: get(row.values) for name, get in self._get.items()}
            return _READERS[self.name or ""](values, row.where)
        except BadRow as error:
            raise UsageError("R208", f"{row.where}: not a row of format {self.name}: {error}") from error

    def _getter(self, name: str, place: str) -> Callable[[Mapping[str, Any]], Any]:
        if ALIASES.get(name, name) not in NAMES:
            raise UsageError(
                "R206",
                f"data source {self._source.path}: columns: unknown name {name!r}",
                f"known names: {', '.join((*NAMES, *ALIASES))}",
            )
        try:
            fields = [field for _, field, _, _ in Formatter().parse(place) if field is not None]
        except ValueError as error:
            raise UsageError(
                "R206", f"columns.{name}: {place!r} is no template: {error}", "write {{ for a brace"
            ) from error
        for column in fields or [place]:
            if column not in self._columns:
                raise UsageError(
                    "R206",
                    f"data source {self._source.path}: columns.{name} names a column {column!r} that does not exist",
                    f"columns that exist: {', '.join(self._columns)}",
                )
        return _template(place) if fields else _column(place)

    def _no_format(self, missing: list[str]) -> UsageError:
        known = "; ".join(f"{name} ({', '.join(needs)})" for name, needs in REQUIRED.items())
        problem = f"format {self.name} needs {', '.join(missing)}" if missing else "no known format fits"
        return UsageError(
            "R207",
            f"data source {self._source.path}: {problem}; its columns are {', '.join(self._columns)}",
            f"map them with `columns`, such as {{prompt: question, completion: answer}}. Formats: {known}",
        )


def _detect(names: Collection[str]) -> str | None:
    return next((name for name, needs in REQUIRED.items() if all(need in names for need in needs)), None)


def _column(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda values: values.get(name)


def _template(template: str) -> Callable[[Mapping[str, Any]], Any]:
    def fill(values: Mapping[str, Any]) -> str:
        parts = []
        for literal, field, _, _ in Formatter().parse(template):
            parts += [literal, "" if field is None else _plain(values.get(field))]
        return "".join(parts)

    return fill


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _conversation(values: Mapping[str, Any], where: str, column: str) -> Example:
    messages = _with_system(values, as_messages(values[column], column))
    return Example(where, messages, as_tools(values.get("tools")))


def _prompt_completion(values: Mapping[str, Any], where: str) -> Example:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = (
            as_messages(prompt, "prompt") if isinstance(prompt, list) else [_message("user", text(prompt, "prompt"))]
        )
        if isinstance(completion, list):
            answered = as_messages(completion, "completion")
        else:
            answered = [_message("assistant", text(completion, "completion"))]
        asked = _with_system(values, asked)
        return Example(where, asked + answered, as_tools(values.get("tools")), context=len(asked))
    return _pair(values, where, text(prompt, "prompt"), text(completion, "completion"), separator="")


def _alpaca(values: Mapping[str, Any], where: str) -> Example:
    instruction, extra = text(values["instruction"], "instruction"), text(values.get("input") or "", "input")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return _pair(values, where, prompt, text(values["output"], "output"), separator="\n\n")


def _pair(values: Mapping[str, Any], where: str, prompt: str, completion: str, separator: str) -> Example:
    """``separator`` stands between the texts without a chat template, where nothing else marks the border."""
    messages = _with_system(values, [_message("user", prompt)])
    context = len(messages)
    system = f"{messages[0]['content']}\n\n" if context > 1 else ""
    messages.append(_message("assistant", completion))
    plain = f"{system}{prompt}{separator}"
    return Example(where, messages, as_tools(values.get("tools")), context, prompt=plain, completion=completion)


def _raw(values: Mapping[str, Any], where: str) -> Example:
    return Example(where, text=text(values["text"], "text"))


_READERS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "messages": lambda values, where: _conversation(values, where, "messages"),
    "sharegpt": lambda values, where: _conversation(values, where, "conversations"),
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _raw,
}


def _with_system(values: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, after the text of a `system` column if the row has one and does not begin with its own."""
    system = values.get("system")
    if not system or messages[0]["role"] in ("system", "developer"):
        return messages
    return [_message("system", text(system, "system")), *messages]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
