"""What a grammar may ask for: its size, and nothing that takes the parser minutes or gigabytes before its own limits
stop it. The numbers are such that nothing that is let through takes more than a few seconds to compile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal, DecimalException
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from rayft.errors import UsageError
from rayft.inference.grammar import Grammar

LONGEST = 2**18
"""Characters of a schema, or of choices."""
LONGEST_RULES = 2**14
"""Characters of a Lark grammar without the schemas in it."""
LONGEST_PATTERN = 2**12
"""Characters of an expression, and of all patterns in a schema: compiling one takes time with its square."""
LARGEST_STEP = 20_000
"""Of the least common multiple of all `multipleOf` in a schema, in units of its last digit: as many states."""
DEEPEST = 64
"""Levels of brackets."""


def refused(kind: str, reason: str, hint: str | None = None) -> UsageError:
    return UsageError("R817", f"structured output ({kind}): {reason}", hint)


def check(grammar: Grammar) -> None:
    """Raises UsageError R817 for what is beyond the limits, or refers to something elsewhere."""
    kind, value = grammar.kind, grammar.value
    _at_most(kind, len(value), LONGEST, "characters")
    if kind == "json_schema":
        check_schema(parsed(kind, value), kind)
    elif kind in ("regex", "lark"):
        _at_most(kind, _bracket_depth(value), DEEPEST, "levels of brackets")
        if kind == "regex":
            _at_most(kind, len(value), LONGEST_PATTERN, "characters")
        else:
            rules, schemas = _lark_parts(value)
            _at_most(kind, len(rules), LONGEST_RULES, "characters beside schemas")
            check_schema(schemas, kind)


def check_schema(schema: Any, kind: str) -> None:
    """A schema as `json.loads` reads it, or a list of schemas. Raises UsageError R817."""
    steps: list[Fraction] = []
    patterns = 0
    for value in _objects(schema, kind):
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(value.get(key), str) and not value[key].startswith("#"):
                raise refused(
                    kind, f"$ref {value[key][:100]!r}: only references inside the schema (`#/...`) are followed"
                )
        if isinstance(value.get("pattern"), str):
            patterns += len(value["pattern"])
        if isinstance(value.get("patternProperties"), dict):
            patterns += sum(map(len, value["patternProperties"]))
        if isinstance(value.get("multipleOf"), int | float) and value["multipleOf"] > 0:
            steps.append(_fraction(value["multipleOf"], kind))
    _at_most(kind, patterns, LONGEST_PATTERN, "characters of patterns")
    if steps:
        common = Fraction(lcm(*(step.numerator for step in steps)), gcd(*(step.denominator for step in steps)))
        _at_most(kind, common.numerator, LARGEST_STEP, "as the least common multiple of all multipleOf")


def parsed(kind: str, text: str) -> Any:
    """Raises UsageError R817 for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(kind, f"not valid JSON: {error}") from error


def _at_most(kind: str, given: int, limit: int, what: str) -> None:
    if given > limit:
        raise refused(kind, f"{given if given < 10**12 else 'more than 10^12'} {what}; the limit is {limit}")


def _objects(schema: Any, kind: str) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value, without recursion."""
    level, depth = [schema], 0
    while level:
        depth += 1
        _at_most(kind, depth, DEEPEST, "levels")
        yield from (value for value in level if isinstance(value, dict))
        level = [
            below
            for value in level
            if isinstance(value, dict | list)
            for below in (value.values() if isinstance(value, dict) else value)
        ]


def _fraction(number: float, kind: str) -> Fraction:
    """As it is written in decimal. Raises UsageError R817 for an infinite one."""
    try:
        value = Decimal(str(number))
        if value.is_finite() and abs(value.adjusted()) <= 30:
            return Fraction(value)
    except DecimalException:
        pass
    raise refused(kind, f"multipleOf {number}: out of range")


def _lark_parts(text: str) -> tuple[str, list[Any]]:
    """(the rules, the schemas of their `%json`). Raises UsageError R817 for one that is not plain JSON."""
    rules, schemas, at = [], [], 0
    decoder = json.JSONDecoder()
    for match in re.finditer(r"%json\s*", text):
        if match.start() < at:  # a text inside a schema
            continue
        try:
            schema, end = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError) as error:
            raise refused("lark", f"%json takes a JSON object: {error}") from error
        rules.append(text[at : match.end()])
        schemas.append(schema)
        at = end
    return "".join([*rules, text[at:]]), schemas


def _bracket_depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(depth - 1, 0)
    return deepest
