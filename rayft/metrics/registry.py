"""Metrics by name, and the user's own by import path."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from rayft.errors import UsageError
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
    place, colon, function = name.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
        own = "write package.module:function or file.py:function for your own"
        raise UsageError(
            "R701",
            f"evaluate.metrics: there is no metric {name!r}; there are {', '.join(METRICS)}",
            f"did you mean {near[0]}?" if near else own,
        )
    try:
        metric = getattr(_module(place), function, None)
    except Exception as error:  # importing the user's module runs the user's code
        raise UsageError("R701", f"evaluate.metrics: cannot import {place}: {type(error).__name__}: {error}") from error
    if not callable(metric):
        raise UsageError("R701", f"evaluate.metrics: {place} has no function {function!r}")
    return metric


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


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None  # given for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
