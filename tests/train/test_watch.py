"""Synthetic curves: what must be seen is seen within a few steps, and healthy noise is left alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rayft.train.watch import Limits, Verdict, Watch


def run(
    watch: Watch, losses: np.ndarray, norms: np.ndarray | None = None, rates: np.ndarray | None = None
) -> list[Verdict]:
    """Every verdict that is not none."""
    verdicts = [
        watch.update(
            step,
            float(loss),
            None if norms is None else float(norms[step]),
            None if rates is None else float(rates[step]),
        )
        for step, loss in enumerate(losses)
    ]
    return [verdict for verdict in verdicts if verdict.kind != "none"]


def healthy(rng: np.random.Generator, steps: int = 600, noise: float = 0.15) -> np.ndarray:
    """A decaying curve with multiplicative noise, as small batches give it."""
    trend = 0.6 + 1.9 * np.exp(-np.arange(steps) / (steps / 6))
    return trend * np.exp(noise * rng.standard_normal(steps))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.02, 0.15, 0.4])
def test_noisy_healthy_curves_are_left_alone(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    losses = healthy(rng, noise=noise)
    norms = np.exp(0.6 * rng.standard_normal(600))
    assert run(Watch(Limits.for_run(600)), losses, norms) == []


@pytest.mark.parametrize("seed", range(20))
def test_heavy_tails_and_single_spikes_are_left_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = healthy(rng)
    norms = np.exp(0.6 * rng.standard_normal(600))
    spikes = rng.choice(600, 30, replace=False)
    losses[spikes] *= 6
    norms[spikes] *= 100
    assert run(Watch(Limits.for_run(600)), losses, norms) == []


@pytest.mark.parametrize("seed", range(10))
def test_an_overfitted_model_with_hard_examples_is_left_alone(seed: int) -> None:
    """Near zero loss a hard example is a hundred times the median."""
    rng = np.random.default_rng(seed)
    losses = 2.0 * np.exp(-np.arange(800) / 60) + 0.002 * np.exp(rng.standard_normal(800))
    hard = rng.random(800) < 0.2
    losses[hard] += 0.3 * rng.random(int(hard.sum()))
    norms = 5 * losses + 0.01
    assert run(Watch(Limits.for_run(800)), losses, norms) == []


def test_warmup_that_rises_a_little_is_left_alone() -> None:
    losses = np.concatenate([np.linspace(1.5, 1.9, 15), np.linspace(1.9, 0.7, 200)])
    assert run(Watch(), losses) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_no_number(value: float) -> None:
    losses = np.array([2.0, 1.9, 1.8, value, value, 1.7, value])
    verdicts = run(Watch(), losses)
    assert [(verdict.kind, verdict.step) for verdict in verdicts] == [("nan", 3), ("nan", 6)]  # each time it begins
    assert verdicts[0].diverged and "2, 1.9, 1.8" in verdicts[0].evidence


def test_gradient_that_is_no_number() -> None:
    watch = Watch()
    assert watch.update(1, 2.0, 1.0).kind == "none"
    assert watch.update(2, 2.0, math.nan).kind == "nan"


def test_fp16_may_overflow_a_few_times() -> None:
    watch = Watch(Limits.for_run(100, fp16=True))
    verdicts = [watch.update(step, 2.0, math.inf) for step in range(25)]
    assert [verdict.step for verdict in verdicts if verdict.diverged] == [20]
    assert "21 steps in a row" in verdicts[20].evidence


@pytest.mark.parametrize("seed", range(10))
def test_explosion_is_seen_within_ten_steps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = healthy(rng, 300)
    losses[200:] = 8 + rng.standard_normal(100)
    verdicts = run(Watch(), losses)
    assert [verdict.kind for verdict in verdicts] == ["explosion"]  # once
    assert 200 < verdicts[0].step <= 210
    assert "began at" in verdicts[0].evidence


def test_explosion_from_the_start() -> None:
    losses = np.concatenate([np.full(10, 2.0), np.linspace(2.0, 11.0, 40)])
    (verdict,) = run(Watch(), losses)
    assert verdict.kind == "explosion" and verdict.step < 35


def test_slow_climb_is_seen_although_the_running_median_follows() -> None:
    losses = np.concatenate([np.linspace(2.0, 1.5, 100), np.linspace(1.5, 9.0, 1500)])
    (verdict,) = [verdict for verdict in run(Watch(), losses) if verdict.diverged]
    assert verdict.kind == "explosion" and "come down to 1.5" in verdict.evidence


def test_gradient_spike_with_rising_loss() -> None:
    rng = np.random.default_rng(0)
    losses = np.concatenate([np.full(100, 1.5) + 0.02 * rng.standard_normal(100), np.linspace(1.9, 2.6, 20)])
    norms = np.concatenate([np.full(100, 0.5), np.full(20, 40.0)])
    (verdict,) = run(Watch(), losses, norms)
    assert verdict.kind == "explosion" and "gradient norm" in verdict.evidence and verdict.step < 110


def test_stagnation_is_a_warning_that_comes_at_most_once_per_window() -> None:
    rng = np.random.default_rng(0)
    losses = 2.0 + 0.05 * rng.standard_normal(1000)
    verdicts = run(Watch(Limits(stagnation_window=200)), losses, rates=np.full(1000, 1e-4))
    assert {verdict.kind for verdict in verdicts} == {"stagnation"}
    assert 1 <= len(verdicts) <= 5 and not verdicts[0].diverged
    assert verdicts[0].step == 199


def test_no_stagnation_without_a_learning_rate_or_after_learning() -> None:
    rng = np.random.default_rng(0)
    flat = 2.0 + 0.05 * rng.standard_normal(600)
    rates = np.concatenate([np.full(100, 1e-4), np.full(500, 5e-6)])
    assert run(Watch(Limits(stagnation_window=200)), flat, rates=rates) == []
    learned = np.concatenate([np.linspace(2.0, 0.3, 100), np.full(500, 0.3)])
    assert run(Watch(Limits(stagnation_window=200)), learned) == []


def test_state_continues_exactly() -> None:
    rng = np.random.default_rng(3)
    losses = healthy(rng, 300)
    losses[250:] = 9.0
    norms = np.exp(rng.standard_normal(300))
    whole = Watch(max_grad_norm=1.0)
    expected = [whole.update(step, float(losses[step]), float(norms[step]), 1e-3) for step in range(300)]
    for cut in (0, 1, 7, 120, 252):
        first = Watch(max_grad_norm=1.0)
        for step in range(cut):
            first.update(step, float(losses[step]), float(norms[step]), 1e-3)
        second = Watch(max_grad_norm=1.0)
        second.load(json.loads(json.dumps(first.state())))
        rest = [second.update(step, float(losses[step]), float(norms[step]), 1e-3) for step in range(cut, 300)]
        assert rest == expected[cut:]
        assert second.statistics() == whole.statistics()


def test_gradient_statistics_are_numpys() -> None:
    norms = np.random.default_rng(0).gamma(2.0, 1.0, 40)
    watch = Watch(max_grad_norm=2.0)
    for step, norm in enumerate(norms):
        watch.update(step, 1.0, float(norm))
    found = watch.statistics()
    assert found["grad_norm_mean"] == pytest.approx(norms.mean())
    assert found["grad_norm_p95"] == np.percentile(norms, 95, method="inverted_cdf")
    assert found["grad_norm_max"] == norms.max()
    assert found["grad_norm_clipped"] == pytest.approx((norms > 2.0).mean())
    assert Watch().statistics() == {}
