"""Calls that are written as markup, not as JSON: a name, and each argument between tags of its own.

Known to be written by the templates of Qwen3-Coder and Qwen3.5 (`<function=NAME><parameter=KEY>VALUE</parameter>`),
GLM-4.5 (`NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>`) and MiniMax-M2 (`<invoke name="NAME">`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEYS, VALUES = ("rayftkey", "rayftother"), ("rayftvalue", "rayftmore")
"""Of the call that a template is tried with: two arguments show what stands between them."""
_BEFORE = re.compile(r"(<[^<>/][^<>]*>|\[[A-Z_]+\])(\s*)(<[^<>]*)?$")
"""The mark that announces a call, blanks, and what opens the name."""
_WORDS = {"True": True, "False": False, "None": None}
"""What a template writes that turns its values into text."""
_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Markup:
    """``opening`` NAME ``named`` (``key`` KEY ``value`` VALUE ``ended``)* ``closing``, blanks included."""

    opening: str
    """`<function=`; empty = the name comes first."""
    named: str
    key: str
    """`<parameter=`."""
    value: str
    ended: str
    """`</parameter>`."""
    closing: str
    """`</function>`; empty = the end of the whole call is that of its function, too."""

    def calls(self, text: str) -> list[tuple[str, dict[str, str]]]:
        """(name, arguments as they were written) of a text that consists of calls; none where it does not. Blanks
        between the parts do not matter."""
        head = re.compile(rf"{_loose(self.opening)}\s*([\w.-]+){_loose(self.named)}")
        ended = re.escape(self.ended.strip())
        argument = re.compile(rf"{_loose(self.key)}\s*([^<>\n]+?){_loose(self.value)}(.*?){ended}", re.DOTALL)
        closing = re.compile(_loose(self.closing))
        found: list[tuple[str, dict[str, str]]] = []
        text, at = text.rstrip(), 0
        while at < len(text):
            if (begun := head.match(text, at)) is None:
                return []
            arguments: dict[str, str] = {}
            at = begun.end()
            while given := argument.match(text, at):
                arguments[given[1]] = self._value(given[2])
                at = given.end()
            if (closed := closing.match(text, at)) is None:
                return []
            found.append((begun[1], arguments))
            at = closed.end()
        return found

    def _value(self, text: str) -> str:
        """Without the blanks that the template writes around it."""
        before, after = _blanks_after(self.value), self.ended[: len(self.ended) - len(self.ended.lstrip())]
        return text.removeprefix(before).removesuffix(after)


def learnt(before: str, after: str) -> tuple[str, str, Markup, str] | None:
    """(mark, blanks after it, the markup, mark at the end) from what a template writes before and after the name of
    a function that is called with the arguments `KEYS` and `VALUES`; None where it is not written as markup."""
    mark, words = _BEFORE.search(before), "|".join((*KEYS, *VALUES))
    if mark is None or re.findall(words, after) != [KEYS[0], VALUES[0], KEYS[1], VALUES[1]]:
        return None
    named, value, between, again, after = re.split(words, after)
    common = _common_end(named, between)
    key = common[common.rfind("<") :] if "<" in common else ""
    if not key or value != again or ">" not in value:
        return None
    ended = between.removesuffix(key)
    if not after.startswith(ended.rstrip()) or not ended.strip():
        return None
    after = after[len(ended.rstrip()) :].strip()
    end = re.search(r"(</[^<>]*>|\[/[A-Z_]+\])$", after)
    if end is None:
        return None
    markup = Markup(mark[3] or "", named.removesuffix(key), key, value, ended, after[: end.start()])
    return mark[1], mark[2], markup, end[1]


def typed(text: str, schema: Any, root: Schema) -> Any:
    """The value of an argument as its schema wants it; text where nothing else fits. root: what `$ref` refers to."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        value = json.loads(text, parse_constant=lambda word: word)
    except (ValueError, RecursionError):
        value = _WORDS.get(text.strip(), text)
    wanted = _kinds(schema, root)
    kind = _KINDS.get(type(value), "null")
    return value if not wanted or kind in wanted or (kind == "integer" and "number" in wanted) else text


def _kinds(schema: Any, root: Schema, depth: int = 8) -> set[str]:
    """The types that a schema allows; empty = any, as far as one can see. What is no schema allows any."""
    if not isinstance(schema, Mapping) or not depth:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for part in reference.removeprefix("#").strip("/").split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return _kinds(target, root, depth - 1)
    named, branches = schema.get("type"), schema.get("anyOf", schema.get("oneOf"))
    if named is not None:
        return {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    found = [_kinds(branch, root, depth - 1) for branch in branches] if isinstance(branches, list) else []
    return set().union(*found) if all(found) else set()


def _loose(text: str) -> str:
    """An expression for a part of the markup, with any blanks before and within it."""
    return "".join(rf"\s*{re.escape(word)}" for word in text.split())


def _blanks_after(text: str) -> str:
    return text[len(text.rstrip()) :]


def _common_end(one: str, other: str) -> str:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]
