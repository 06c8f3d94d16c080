"""A `Grammar` in llguidance's own form. Nothing is compiled here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rayft.inference.grammar import Grammar
from rayft.inference.grammar_limits import check, parsed, refused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

BLANKS = r"( |\n[ \t]{0,32})"
"""Between the parts of JSON: nothing, one space, or a line break with indentation. A model that is not sure may write
blanks for ever where any number is allowed."""
JSON: JsonCompileOptions = {"whitespace_pattern": BLANKS, "lenient": False}
"""Not lenient: a keyword that cannot be enforced is refused."""


def to_llguidance(grammar: Grammar) -> str:
    """Raises UsageError R817 for what is beyond the limits, or has not the shape that its kind asks for."""
    from llguidance import LLMatcher, regex_to_lark

    check(grammar)
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON)
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(_schema(grammar), overrides=JSON)
    if grammar.kind == "choice":  # one terminal, not a rule with as many alternatives, of which there may be few
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(lark_text, _choices(grammar))))
    text = without_anchors(grammar.value) if grammar.kind == "regex" else grammar.value
    if not text.strip():
        raise refused(grammar.kind, "it is empty")
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'd')}/" if grammar.kind == "regex" else text)


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
    schema = parsed(grammar.kind, grammar.value)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise refused(grammar.kind, "a schema is a JSON object")
    return schema


def _choices(grammar: Grammar) -> list[str]:
    texts = parsed(grammar.kind, grammar.value)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise refused(grammar.kind, "a list of one or more texts is needed")
    if "" in texts:
        raise refused(grammar.kind, "an empty text is no choice")
    return list(dict.fromkeys(texts))
