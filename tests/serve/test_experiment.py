"""Statistics of variants, against scipy and numpy, and against samples whose difference is known."""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest
from scipy import stats

from rayft.errors import UsageError
from rayft.serve.experiment import LEAST, WINDOW, Experiments, compare


def latencies(seed: int, count: int, shift: float = 0.0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).lognormal(0.0, 0.8, count) + shift]


def test_numbers_of_a_variant() -> None:
    experiments, times = Experiments(), latencies(0, 101)
    for number, seconds in enumerate(times):
        experiments.observe("bot", 1, f"id{number}", seconds=seconds, tokens=number, ok=True)
    experiments.observe("bot", 1, "bad", seconds=99.0, tokens=0, ok=False)
    assert experiments.feedback("id3", 1) == ("bot", 1)
    experiments.feedback("id4", 0)
    (one,) = experiments.report("bot").variants
    assert (one.version, one.count, one.window, one.feedback_count, one.mean_feedback) == (1, 102, 102, 2, 0.5)
    assert one.error_rate == pytest.approx(1 / 102) and one.mean_tokens == 50
    assert (one.mean, one.p50, one.p95) == pytest.approx(
        (np.mean(times), np.percentile(times, 50), np.percentile(times, 95))
    )
    assert experiments.report("bot").comparisons == () and experiments.report("nobody").variants == ()
    experiments.forget("bot")
    assert experiments.report("bot").variants == ()


def test_only_failures_and_only_feedback() -> None:
    experiments = Experiments()
    experiments.observe("bot", 1, "a", seconds=1.0, tokens=0, ok=False)
    (one,) = experiments.report("bot").variants
    assert (one.error_rate, one.mean, one.p50, one.p95, one.mean_feedback) == (1.0, None, None, None, None)
    experiments.forget("bot")
    experiments.feedback("a", 2.0)
    (one,) = experiments.report("bot").variants
    assert (one.count, one.error_rate, one.mean_feedback) == (0, None, 2.0)


def test_comparison_is_scipys() -> None:
    a, b = latencies(1, 80), latencies(2, 120, shift=0.3)
    found = compare("latency", 1, 2, a, b)
    expected = stats.mannwhitneyu(b, a, alternative="two-sided")
    differences = np.array([y - x for x, y in product(a, b)])
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.superiority == pytest.approx(expected.statistic / (80 * 120))
    assert found.superiority == pytest.approx(np.mean(differences > 0))
    assert found.shift == pytest.approx(np.median(differences))
    assert found.low is not None and found.high is not None and found.low < found.shift < found.high
    mirrored = compare("latency", 2, 1, b, a)
    assert (mirrored.shift, mirrored.low, mirrored.high) == pytest.approx((-found.shift, -found.high, -found.low))


def test_the_interval_holds_the_true_shift_as_often_as_it_says() -> None:
    """Of 400 pairs of samples with a known shift, about 95% of the intervals hold it, and the test agrees with them."""
    held, agree = 0, 0
    for seed in range(400):
        found = compare("latency", 1, 2, latencies(2 * seed, 40), latencies(2 * seed + 1, 50, shift=0.5))
        assert found.low is not None and found.high is not None and found.p_value is not None
        held += found.low <= 0.5 <= found.high
        agree += (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert 0.92 <= held / 400 <= 0.98
    assert agree / 400 > 0.98


def test_equal_versions_are_seldom_told_apart() -> None:
    p = [compare("latency", 1, 2, latencies(9000 + s, 40), latencies(5000 + s, 40)).p_value or 0 for s in range(400)]
    assert sum(value < 0.05 for value in p) / 400 < 0.08


def test_too_few_observations_are_not_compared() -> None:
    for counts in ((LEAST - 1, 500), (500, LEAST - 1), (0, 0)):
        found = compare("latency", 1, 2, latencies(1, counts[0]), latencies(2, counts[1]))
        assert found.counts == counts and not found.enough
        assert (found.p_value, found.superiority, found.shift, found.low, found.high) == (None,) * 5
    assert compare("latency", 1, 2, latencies(1, LEAST), latencies(2, LEAST)).enough


def test_ties_only() -> None:
    found = compare("feedback", 1, 2, [1.0] * 40, [1.0] * 40)
    assert (found.p_value, found.superiority, found.shift, found.low, found.high) == (1.0, 0.5, 0.0, 0.0, 0.0)


def test_report_compares_with_the_version_that_answers_most() -> None:
    experiments = Experiments()
    for version, count in ((1, 40), (2, 60), (3, 10)):
        for number, seconds in enumerate(latencies(version, count, shift=version)):
            id = f"{version}-{number}"
            experiments.observe("bot", version, id, seconds=seconds, tokens=5, ok=True)
            experiments.feedback(id, version % 2)
    experiments.observe("other", 7, "x", seconds=1.0, tokens=1, ok=True)
    report = experiments.report("bot", {1: 0.8, 2: 0.15, 3: 0.05})
    assert [variant.version for variant in report.variants] == [1, 2, 3]
    found = {(c.measure, c.version): c for c in report.comparisons}
    assert {c.baseline for c in report.comparisons} == {1}
    assert set(found) == {("latency", 2), ("latency", 3), ("feedback", 2), ("feedback", 3)}
    slower = found["latency", 2]
    assert slower.enough and slower.shift == pytest.approx(1.0, abs=0.5) and (slower.p_value or 0) < 0.01
    assert found["feedback", 2].shift == -1.0 and not found["latency", 3].enough
    assert {c.baseline for c in experiments.report("bot").comparisons} == {2}, "without weights, the one asked most"


def test_feedback_that_is_refused() -> None:
    experiments = Experiments()
    with pytest.raises(UsageError, match="R433"):
        experiments.feedback("never", 1.0)
    experiments.observe("bot", 1, "a", seconds=1.0, tokens=1, ok=True)
    for score in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="R427"):
            experiments.feedback("a", score)


def test_memory_is_bounded() -> None:
    experiments = Experiments()
    for number in range(25_000):
        experiments.observe("bot", 1, str(number), seconds=float(number), tokens=1, ok=True)
    (one,) = experiments.report("bot").variants
    assert (one.count, one.window) == (25_000, WINDOW) and one.p50 == pytest.approx(24_499.5)
    for name in range(1000):
        experiments.observe(f"bot{name}", 1, "x", seconds=1.0, tokens=1, ok=True)
    assert experiments.report("bot").variants == () and experiments.report("bot999").variants
    assert len(experiments._variants) == 256 and len(experiments._requests) == 20_000
    assert sys.getsizeof(experiments._variants) < 100_000
