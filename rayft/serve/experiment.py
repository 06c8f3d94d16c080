"""How the versions of an alias do beside each other: latencies, errors and what users think of the answers.

Numbers are of this process and in memory only: the last observations of each version, so that it stays small.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayft.errors import UsageError

WINDOW = 1000
"""Observations kept of each version."""
LEAST = 30
"""Fewest observations of each of two versions that are compared."""
_VARIANTS = 256
"""Versions whose observations are kept: those that were asked last."""
_REQUESTS = 20_000
"""Requests whose version is remembered, for feedback that comes later."""
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class VariantStats:
    """What was seen of one version."""

    version: int
    count: int
    """Requests since the server started."""
    window: int
    """The last ones, which all that follows is about."""
    error_rate: float | None
    """Share of requests that failed; None without any, and so are the next ones."""
    mean: float | None
    """Seconds from request to last token, of those that did not fail; so are the next two."""
    p50: float | None
    p95: float | None
    mean_tokens: float | None
    """Of an answer."""
    feedback_count: int
    mean_feedback: float | None


@dataclass(frozen=True)
class Comparison:
    """Two versions by one number."""

    measure: str
    """`latency` (seconds, of requests that did not fail) or `feedback`."""
    baseline: int
    version: int
    counts: tuple[int, int]
    """Observations of the baseline and of the version."""
    enough: bool
    """Whether both have at least 30; else the rest is None."""
    p_value: float | None = None
    """Of the Mann-Whitney U test, two-sided: how often chance alone puts the two that far apart."""
    superiority: float | None = None
    """The share of pairs in which the version's number is the larger one, ties as half: 0.5 = no difference."""
    shift: float | None = None
    """Hodges-Lehmann: the median difference of a pair, version minus baseline."""
    low: float | None = None
    """Of the shift's 95% interval; so is the next one."""
    high: float | None = None


@dataclass(frozen=True)
class Report:
    """An alias's versions, and each of them compared with the one that answers most."""

    alias: str
    variants: tuple[VariantStats, ...]
    comparisons: tuple[Comparison, ...]


@dataclass
class _Variant:
    count: int = 0
    seen: deque[tuple[float, int, bool]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))


class Experiments:
    """Observations by alias and version. Thread-safe."""

    def __init__(self) -> None:
        self._variants: OrderedDict[tuple[str, int], _Variant] = OrderedDict()
        self._requests: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._lock = threading.Lock()

    def observe(self, alias: str, version: int, id: str, *, seconds: float, tokens: int, ok: bool) -> None:
        """Note a request that ended. id: as the client got it."""
        with self._lock:
            variant = self._of(alias, version)
            variant.count += 1
            variant.seen.append((seconds, tokens, ok))
            self._requests[id] = (alias, version)
            if len(self._requests) > _REQUESTS:
                self._requests.popitem(last=False)

    def feedback(self, id: str, score: float) -> tuple[str, int]:
        """Note what a user thinks of an answer, on any scale on which more is better; (alias, version) that answered.

        Raises UsageError: R433 for a request that is not known (any more), R427 for a score that is not finite.
        """
        if not math.isfinite(score):
            raise UsageError("R427", f"the score {score!r} is not a finite number")
        with self._lock:
            if id not in self._requests:
                hint = f"the last {_REQUESTS} requests to adapters of this server take feedback"
                raise UsageError("R433", f"no request {id[:100]!r} is known here", hint)
            alias, version = self._requests[id]
            self._of(alias, version).scores.append(float(score))
        return alias, version

    def forget(self, alias: str) -> None:
        """Begin anew with an alias."""
        with self._lock:
            for key in [key for key in self._variants if key[0] == alias]:
                del self._variants[key]

    def report(self, alias: str, weights: Mapping[int, float] | None = None) -> Report:
        """weights: of the alias; the version with the largest one is what others are compared with, and without them
        the one with the most requests."""
        with self._lock:
            variants = {
                number: (variant.count, list(variant.seen), list(variant.scores))
                for (name, number), variant in sorted(self._variants.items(), key=lambda item: item[0])
                if name == alias
            }
        stats = tuple(_stats(number, *rest) for number, rest in variants.items())
        comparisons: list[Comparison] = []
        if len(variants) > 1:
            by_share = {number: (weights or {}).get(number, 0.0) for number in variants}
            baseline = max(variants, key=lambda number: (by_share[number], variants[number][0]))
            for number in sorted(variants.keys() - {baseline}):
                times = [[seconds for seconds, _, ok in variants[n][1] if ok] for n in (baseline, number)]
                scores = [variants[n][2] for n in (baseline, number)]
                comparisons.append(compare("latency", baseline, number, *times))
                if any(scores):
                    comparisons.append(compare("feedback", baseline, number, *scores))
        return Report(alias, stats, tuple(comparisons))

    def _of(self, alias: str, version: int) -> _Variant:
        variant = self._variants.setdefault((alias, version), _Variant())
        self._variants.move_to_end((alias, version))
        if len(self._variants) > _VARIANTS:
            self._variants.popitem(last=False)
        return variant


def compare(measure: str, baseline: int, version: int, a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Whether ``b`` (the version's numbers) is shifted against ``a`` (the baseline's).

    Latencies are skewed and have outliers, so ranks are compared, not means: the Mann-Whitney U test (Mann and Whitney
    1947) with the normal approximation, corrected for ties and continuity. How much: the median of all differences
    (Hodges and Lehmann 1963), with the interval between their order statistics (Hollander, Wolfe and Chicken,
    Nonparametric Statistical Methods, section 4.3). Looking again and again until p is small finds differences that are
    not there: fix the number of requests first.
    """
    counts = (len(a), len(b))
    if min(counts) < LEAST:
        return Comparison(measure, baseline, version, counts, enough=False)
    import numpy as np
    from scipy.stats import mannwhitneyu, norm

    result = mannwhitneyu(b, a, alternative="two-sided", method="asymptotic")
    pairs = counts[0] * counts[1]
    differences = np.subtract.outer(np.asarray(b, dtype=np.float64), np.asarray(a, dtype=np.float64)).ravel()
    spread = math.sqrt(pairs * (sum(counts) + 1) / 12)
    outside = max(0, math.floor(pairs / 2 - float(norm.ppf((1 + _CONFIDENCE) / 2)) * spread) - 1)
    differences.partition([outside, pairs - 1 - outside])
    low, high = float(differences[outside]), float(differences[pairs - 1 - outside])
    p = float(result.pvalue)
    return Comparison(
        measure,
        baseline,
        version,
        counts,
        enough=True,
        p_value=p if math.isfinite(p) else 1.0,  # all numbers are the same
        superiority=float(result.statistic) / pairs,
        shift=float(np.median(differences)),
        low=low,
        high=high,
    )


def _stats(number: int, count: int, seen: Sequence[tuple[float, int, bool]], scores: Sequence[float]) -> VariantStats:
    times = sorted(seconds for seconds, _, ok in seen if ok)
    tokens = [tokens for _, tokens, ok in seen if ok]
    return VariantStats(
        version=number,
        count=count,
        window=len(seen),
        error_rate=sum(not ok for _, _, ok in seen) / len(seen) if seen else None,
        mean=_mean(times),
        p50=quantile(times, 0.5),
        p95=quantile(times, 0.95),
        mean_tokens=_mean(tokens),
        feedback_count=len(scores),
        mean_feedback=_mean(scores),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Linear interpolation between order statistics, as numpy's default; None without values."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
