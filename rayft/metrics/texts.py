"""Metrics on answers: (predictions, references), two lists of the same length, to one number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference, apart from white space at both ends. nan without answers."""
    return _share(predictions, references, str.strip)


def exact_match_whitespace(predictions: Sequence[str], references: Sequence[str]) -> float:
    """`exact_match` where every run of white space counts as one space. nan without answers."""
    return _share(predictions, references, lambda text: " ".join(text.split()))


def json_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are the same JSON value as their reference: white space and the order of keys are free.

    An answer that is not strict JSON (NaN and Infinity are not) does not match. nan without answers.

    Raises:
        ValueError: a reference is not JSON.
    """

    def value(text: str) -> str:
        return json.dumps(json.loads(text, parse_constant=_refuse), sort_keys=True)

    def answer(text: str) -> str | None:
        try:
            return value(text)
        except (ValueError, RecursionError):
            return None

    return _share([answer(text) for text in predictions], [value(text) for text in references], lambda same: same)


def _share(predictions: Sequence[Any], references: Sequence[Any], normalise: Callable[[Any], Any]) -> float:
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        return float("nan")
    return sum(normalise(ours) == normalise(theirs) for ours, theirs in pairs) / len(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
