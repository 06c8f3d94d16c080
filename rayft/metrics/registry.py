"""Metrics by name, and the user's own by import path."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

from rayft.errors import UsageError
from rayft.functions import load_function
from rayft.metrics.texts import exact_match, exact_match_whitespace, json_match

Metric = Callable[[Sequence[str], Sequence[str]], float]
"""(predictions, references) -> float; both lists have one text per held-out example, in the same order."""

METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "exact_match_whitespace": exact_match_whitespace,
    "json_match": json_match,
}


def named(name: str) -> Metric:
    """A metric of `METRICS`, or the function at `package.module:function` or `file.py:function`.

    Raises:
        UsageError: R701 there is no such metric or function.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
        own = "write package.module:function or file.py:function for your own"
        raise UsageError(
            "R701",
            f"evaluate.metrics: there is no metric {name!r}; there are {', '.join(METRICS)}",
            f"did you mean {near[0]}?" if near else own,
        )
    return load_function(name, "evaluate.metrics", "R701")


def label(name: str) -> str:
    """The name under which a metric's value is reported: the function's name for an import path."""
    return name.rpartition(":")[2]


def compute(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{label: value} of every metric in `names`.

    Raises:
        UsageError: R701 as `named`; R702 a metric fails or returns something else than a number.
    """
    values = {}
    for name in names:
        metric = named(name)
        try:
            value = float(metric(predictions, references))
        except Exception as error:  # the user's code may raise anything; the message must name the metric
            raise UsageError("R702", f"evaluate.metrics: {name} failed: {type(error).__name__}: {error}") from error
        values[label(name)] = value
    return values


def finite(value: float) -> float | None:
    """The value for JSON, which has no nan and no inf."""
    return value if math.isfinite(value) else None
