"""The best trials once more with other seeds: best-of-many is optimistic, a mean over fresh seeds is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rayft.tune.objective import finite


@dataclass(frozen=True)
class Repeat:
    """A trial and what came out of it with further seeds."""

    trial: int
    values: tuple[float, ...]
    """Of the first objective, one for each seed that the search had not used; not finite where a run failed."""

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if finite(value) is not None]

    def mean(self) -> float | None:
        return fmean(self.known) if self.known else None

    def half_width(self) -> float | None:
        """Half of the mean's 95% confidence interval, by Student's t; None with fewer than two values."""
        return half_width(self.known)


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """t(n - 1, (1 + confidence) / 2) * s / sqrt(n): half of the interval that holds the mean; None with one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def overlap(one: Repeat, other: Repeat) -> bool | None:
    """Whether the two 95% intervals share a value; None where there is no interval."""
    means, halves = (one.mean(), other.mean()), (one.half_width(), other.half_width())
    if None in means or None in halves:
        return None
    return abs(means[0] - means[1]) <= halves[0] + halves[1]  # type: ignore[operator]  # `in` narrows nothing
