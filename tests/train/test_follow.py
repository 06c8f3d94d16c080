"""Somebody who follows a run and may end it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rayft.errors import RunStopped
from rayft.runs.folder import RunFolder
from rayft.train import fit
from tests.train.conftest import Recipes


class Listener:
    def __init__(self, last: int | None = None, error: Exception | None = None) -> None:
        self.last, self.error = last, error
        self.start: tuple[int, int] | None = None
        self.steps: list[int] = []

    def begun(self, total_steps: int, trainable_parameters: int) -> None:
        self.start = (total_steps, trainable_parameters)

    def evaluated(self, row: Mapping[str, Any]) -> bool:
        self.steps.append(row["step"])
        if self.error is not None:
            raise self.error
        return row["step"] == self.last


def test_it_hears_of_every_evaluation(recipe: Recipes) -> None:
    listener = Listener()
    fit(recipe(**{"data.validation": 0.25, "train.eval_steps": 5}), answer=None, quiet=True, watcher=listener)
    assert listener.steps == [5, 10, 15, 20]
    assert listener.start is not None and listener.start[0] == 20 and listener.start[1] > 0


def test_it_ends_the_run_which_saves(recipe: Recipes) -> None:
    listener = Listener(last=4)
    plain = recipe(**{"data.validation": 0.25, "train.eval_steps": 2, "train.max_steps": 100_000})
    with pytest.raises(RunStopped):
        fit(plain, answer=None, quiet=True, watcher=listener)
    assert listener.steps == [2, 4], "it hears of nothing after its decision"
    run = RunFolder.open(f"{plain['storage']}/test")
    assert run.state == "stopped" and max(run.checkpoints()) == run.metrics()[-1]["step"]


def test_its_error_ends_the_run(recipe: Recipes) -> None:
    plain = recipe(**{"train.max_steps": 100_000})
    with pytest.raises(ValueError, match="the follower broke"):
        fit(plain, answer=None, quiet=True, watcher=Listener(error=ValueError("the follower broke")))
    assert RunFolder.open(f"{plain['storage']}/test").state == "failed"
