"""Which trials are the best, against Optuna's own answer."""

from __future__ import annotations

import math
import random

import optuna
import pytest

from rayft.tune.objective import Objective, ranking, standing, winners
from tests.tune.sweeps import trial


@pytest.mark.parametrize("modes", [("min", "min"), ("min", "max"), ("max", "max")])
def test_the_front_is_optunas(modes: tuple[str, str]) -> None:
    draw = random.Random(1)
    points = [(draw.randrange(8) / 8, draw.randrange(8) / 8) for _ in range(60)]  # with ties and duplicates
    objectives = [Objective(name, mode) for name, mode in zip("ab", modes, strict=True)]  # type: ignore[arg-type]
    rows = [trial(n, metrics={"a": a, "b": b}) for n, (a, b) in enumerate(points)]
    study = optuna.create_study(directions=["minimize" if mode == "min" else "maximize" for mode in modes])
    study.add_trials([optuna.trial.create_trial(values=list(point)) for point in points])
    assert sorted(row.number for row in winners(rows, objectives)) == [best.number for best in study.best_trials]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_complete_and_finite(mode: str) -> None:
    rows = [
        trial(0, value=0.5),
        trial(1, value=math.nan),
        trial(2, "pruned", 25, value=0.1 if mode == "min" else 9.0),
        trial(3, "failed", value=0.1),
        trial(4, value=0.7),
        trial(5, value=None),
        trial(6, value=0.5),
    ]
    order = [0, 6, 4] if mode == "min" else [4, 0, 6]
    objectives = [Objective("validation_loss", mode)]  # type: ignore[arg-type]
    assert [row.number for row in ranking(rows, objectives)] == order
    assert [row.number for row in winners(rows, objectives)] == order[:1]
    assert winners(rows[1:4], objectives) == []


def test_pruned_trials_stand_behind_complete_ones_by_how_far_they_came() -> None:
    rows = [
        trial(0, "pruned", 25, value=0.1),
        trial(1, "pruned", 100, value=0.9),
        trial(2, "pruned", 100, value=0.8),
        trial(3, value=0.95),
        trial(4, "running", value=0.01),
    ]
    assert [row.number for row in standing(rows, Objective("validation_loss"))] == [3, 2, 1, 0]
