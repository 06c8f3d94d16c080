"""A `Grammar` checked, and written in llguidance's own form. Nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rayft.errors import UsageError
from rayft.inference.grammar import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST = 2**18
"""Characters of a schema, an expression or a grammar."""
DEEPEST = 64
"""Levels of brackets."""

JSON: JsonCompileOptions = {"whitespace_pattern": r"( |\n[ \t]{0,32})", "lenient": False}
"""Between the parts of JSON: nothing, one space, or a line break with indentation. A model that is not sure may write
blanks for ever where any number is allowed. Not lenient: a keyword that cannot be enforced is refused."""


def refused(kind: str, reason: str, hint: str | None = None) -> UsageError:
    return UsageError("R817", f"structured output ({kind}): {reason}", hint)


def checked(grammar: Grammar) -> None:
    """Raises UsageError R817 for what is too large to be looked at, or would make the parser fetch something."""
    if len(grammar.value) > LONGEST:
        raise refused(grammar.kind, f"{len(grammar.value):,} characters; the limit is {LONGEST:,}")
    if grammar.kind in ("regex", "lark") and not without_anchors(grammar.value):
        raise refused(grammar.kind, "it is empty")
    if grammar.kind in ("regex", "lark") and (depth := _bracket_depth(grammar.value)) > DEEPEST:
        raise refused(grammar.kind, f"brackets are nested {depth} deep; the limit is {DEEPEST}")


def to_llguidance(grammar: Grammar) -> str:
    """Raises UsageError R817 where the value has not the shape that its kind asks for."""
    from llguidance import LLMatcher, regex_to_lark

    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON)
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(_schema(grammar), overrides=JSON)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(without_anchors(grammar.value), 'd')}/")
    if grammar.kind == "choice":  # one terminal, not a rule with as many alternatives, of which there may be few
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(lark_text, _choices(grammar))))
    return LLMatcher.grammar_from_lark(grammar.value)


def lark_text(text: str) -> str:
    """A text as a terminal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def without_anchors(regex: str) -> str:
    """`^` at the beginning and `$` at the end say what holds anyway, since the whole answer matches."""
    start = regex.removeprefix("^")
    body = start.removesuffix("$")
    escapes = len(body) - len(body.rstrip("\\"))
    return start if body != start and escapes % 2 else body


def _schema(grammar: Grammar) -> dict[str, Any]:
    schema = _json(grammar)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise refused(grammar.kind, "a schema is a JSON object")
    for reference in _references(schema, grammar):
        if not reference.startswith("#"):
            raise refused(
                grammar.kind, f"$ref {reference[:100]!r}: only references inside the schema (`#/...`) are followed"
            )
    return schema


def _references(schema: Any, grammar: Grammar) -> Iterator[str]:
    """Every `$ref`, without recursion. Raises UsageError R817 for a schema that is nested too deep."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise refused(grammar.kind, f"nested deeper than {DEEPEST} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
                for key in ("$ref", "$dynamicRef", "$recursiveRef"):
                    if isinstance(value.get(key), str):
                        yield value[key]
            elif isinstance(value, list):
                below.extend(value)
        level = below


def _choices(grammar: Grammar) -> list[str]:
    texts = _json(grammar)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise refused(grammar.kind, "a list of one or more texts is needed")
    if "" in texts:
        raise refused(grammar.kind, "an empty text is no choice")
    return list(dict.fromkeys(texts))


def _json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.value)
    except (ValueError, RecursionError) as error:
        raise refused(grammar.kind, f"not valid JSON: {error}") from error


def _bracket_depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(depth - 1, 0)
    return deepest
