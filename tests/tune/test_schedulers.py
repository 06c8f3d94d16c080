"""Decisions of the rungs are Ray's own: the same curves through Ray's public schedulers, in another setting."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from rayft.config.tune import Tune
from rayft.tune.schedulers import Rungs

Reports = list[tuple[int, int, float]]
"""(trial, step, loss) in the order in which they came in."""


def curves(trials: int, steps: int, seed: int) -> Reports:
    """Learning curves that end at different levels; reports of all trials come mixed."""
    draw = random.Random(seed)
    levels = [draw.uniform(0.5, 2) for _ in range(trials)]
    reports = [
        (trial, step, level + 3 / step + draw.gauss(0, 0.05))
        for trial, level in enumerate(levels)
        for step in range(1, steps + 1)
    ]
    order = sorted(reports, key=lambda report: report[1] + 12 * random.Random(f"{seed}{report[0]}").random())
    return order


def decide(rungs: Rungs, reports: Reports) -> dict[int, int]:
    """Trial -> step at which it was stopped, at its end or before."""
    stopped: dict[int, int] = {}
    for trial in {trial for trial, _, _ in reports}:
        rungs.add(trial)
    for trial, step, loss in reports:
        if trial not in stopped:
            result = {"step": step, "training_iteration": step, "validation_loss": loss}
            if rungs.stops(trial, result):
                stopped[trial] = step
                rungs.ended(trial, result)
    return stopped


def ray_decides(scheduler: Any, reports: Reports, controller: Any = None) -> dict[int, int]:
    """The same through Ray's public interface, its trials created in the opposite order."""
    names = sorted({trial for trial, _, _ in reports}, reverse=True)
    trials = {name: Trial("peer", stub=True) for name in names}
    for trial in trials.values():
        scheduler.on_trial_add(controller, trial)
    stopped: dict[int, int] = {}
    for name, step, loss in reports:
        if name not in stopped:
            result = {"training_iteration": step, "loss": loss}
            if scheduler.on_trial_result(controller, trials[name], result) == TrialScheduler.STOP:
                stopped[name] = step
                scheduler.on_trial_complete(controller, trials[name], result)
    return stopped


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("factor", "grace"), [(2, 3), (3, 1), (4, 2)])
def test_asha_stops_whom_ray_s_asha_stops(seed: int, factor: int, grace: int) -> None:
    reports = curves(trials=20, steps=27, seed=seed)
    tune = Tune.model_validate({"scheduler_args": {"reduction_factor": factor, "grace_period": grace}})
    ours = decide(Rungs(tune, budget=27, seed=0), reports)
    peer = AsyncHyperBandScheduler(
        metric="loss", mode="min", max_t=27, grace_period=grace, reduction_factor=factor, brackets=1
    )
    assert ours == ray_decides(peer, reports)
    assert len(ours) == 20 and min(ours.values()) < 27


def test_the_median_rule_is_ray_s() -> None:
    class Nobody:
        @staticmethod
        def get_live_trials() -> list[Trial]:
            return []

    reports = curves(trials=12, steps=20, seed=3)
    tune = Tune.model_validate({"scheduler": "median", "scheduler_args": {"grace_period": 4}})
    peer = MedianStoppingRule("training_iteration", "loss", "min", grace_period=4, min_samples_required=3)
    ours = decide(Rungs(tune, budget=20, seed=0), reports)
    assert ours == ray_decides(peer, reports, Nobody()) and 0 < len(ours) < 12


def test_a_maximised_metric() -> None:
    reports = [(trial, step, -loss) for trial, step, loss in curves(16, 9, seed=1)]
    tune = Tune.model_validate({"mode": "max", "scheduler_args": {"grace_period": 1}})
    peer = AsyncHyperBandScheduler(metric="loss", mode="max", max_t=9, grace_period=1, reduction_factor=3)
    assert decide(Rungs(tune, 9, seed=0), reports) == ray_decides(peer, reports)


def test_hyperband_s_brackets_are_drawn_alike_after_a_resume() -> None:
    reports = curves(trials=30, steps=27, seed=4)
    tune = Tune.model_validate({"scheduler": "hyperband", "scheduler_args": {"grace_period": 1}})
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = decide(Rungs(tune, 27, seed=5), reports)
    assert first == decide(Rungs(tune, 27, seed=5), reports)
    assert first != decide(Rungs(tune, 27, seed=6), reports)
    assert (np.random.get_state()[1] == before).all(), "the global generator is left alone"  # type: ignore[union-attr]
    asha = decide(Rungs(Tune.model_validate({"scheduler_args": {"grace_period": 1}}), 27, seed=5), reports)
    assert sum(first.values()) > sum(asha.values()), "higher brackets stop later"


def test_milestones() -> None:
    assert Rungs(Tune(), budget=90, seed=0).milestones() == [10, 30, 90]
    given = Tune.model_validate({"scheduler_args": {"grace_period": 4, "reduction_factor": 2, "max_t": 20}})
    assert Rungs(given, budget=90, seed=0).milestones() == [4, 8, 16]
    assert Rungs(Tune(), budget=2, seed=0).milestones() == [1]
    assert Rungs(Tune(scheduler="median"), budget=90, seed=0).milestones() == []


def test_several_objectives_are_not_stopped() -> None:
    rungs = Rungs(Tune(metrics=["validation_loss", "trainable_parameters"]), budget=9, seed=0)
    assert decide(rungs, curves(10, 20, seed=0)) == {}
    assert not rungs.has_full_budget(100)
