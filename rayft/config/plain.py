"""Plain data (dict, list, str, numbers, bool, None): its values by dotted path, and its text as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Plain = Any
"""dict with text keys, list, str, int, float, bool or None."""

# Text that needs no quotes wherever YAML allows a value, for readers of YAML 1.1 too (to whom `no` and `on` are false).
_BARE = re.compile(
    r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[a-z_/](?:[\w ./@%+-]|:(?=[\w/]))*(?<! )", re.ASCII | re.I
)
# Characters that JSON leaves as they are and YAML does not allow, or takes for a line's end.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def leaves(node: Plain, path: str = "") -> Iterator[tuple[str, Plain]]:
    """(dotted path, value) of every value; lists of plain values and empty containers count as one value."""
    if not _is_branch(node):
        yield path, node
        return
    for key, value in _items(node):
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def block(node: Plain, path: str = "") -> Iterator[tuple[str, str | None]]:
    """The lines of a mapping or list as YAML, each with the dotted path of the value on it, or None without one."""
    for key, value in _items(node):
        below = f"{path}.{key}" if path else str(key)
        inner = list(block(value, below)) if _is_branch(value) else [(flow(value), below)]
        if isinstance(node, list):
            yield f"- {inner[0][0]}", inner[0][1]
            yield from ((f"  {line}", leaf) for line, leaf in inner[1:])
        elif _is_branch(value):
            yield f"{flow(key)}:", None
            yield from ((f"  {line}", leaf) for line, leaf in inner)
        else:
            yield f"{flow(key)}: {inner[0][0]}", below


def flow(value: Plain) -> str:
    """A value on one line: JSON, which is YAML too, without the quotes that are not needed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def _is_branch(node: Plain) -> bool:
    if isinstance(node, dict):
        return bool(node)
    return isinstance(node, list) and any(isinstance(item, dict) for item in node)


def _items(node: Plain) -> Iterator[tuple[Any, Plain]]:
    yield from node.items() if isinstance(node, dict) else enumerate(node)
