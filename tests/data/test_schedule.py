"""The schedule of a run: steps across epochs, what normalises each loss, and the tokens seen so far."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.data.plan import step_plan
from rayft.data.schedule import StepSchedule


def schedule(lengths: list[int], **settings: object) -> StepSchedule:
    defaults = {"global_batch_size": 4, "seed": 3, "epochs": 1.0, "max_steps": None}
    sums = np.array(lengths, np.float64) / 2
    return StepSchedule(np.array(lengths, np.int32), sums, **(defaults | settings))  # type: ignore[arg-type] # **settings


@pytest.mark.parametrize(
    ("examples", "settings", "steps"),
    [
        (10, {}, 3),  # the ragged last step counts
        (10, {"epochs": 2.0}, 6),
        (10, {"epochs": 0.5}, 2),  # half of 3 steps, rounded up
        (10, {"epochs": 0.01}, 1),
        (10, {"max_steps": 7}, 7),
        (8, {"epochs": 2.0, "max_steps": 1}, 1),
    ],
)
def test_number_of_steps(examples: int, settings: dict[str, object], steps: int) -> None:
    assert schedule([5] * examples, **settings).total_steps == steps


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 99))
def test_an_epoch_is_the_plan_of_that_epoch(lengths: list[int], batch: int, seed: int) -> None:
    run = schedule(lengths, global_batch_size=batch, seed=seed, epochs=2.0)
    planned = [step for epoch in (0, 1) for step in step_plan(lengths, batch, seed, epoch)]
    assert [run.examples(step) for step in range(run.total_steps)] == planned


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 9))
def test_tokens_and_weights_add_up_over_the_epochs(lengths: list[int], batch: int) -> None:
    run = schedule(lengths, global_batch_size=batch, epochs=3.0)
    steps = range(run.total_steps)
    assert sum(map(run.tokens, steps)) == run.tokens_before(run.total_steps) == 3 * sum(lengths)
    assert [run.tokens_before(step) for step in steps] == list(np.cumsum([0, *map(run.tokens, steps)])[:-1])
    assert sum(map(run.weight, steps)) == pytest.approx(3 * sum(lengths) / 2)


def test_an_interval_is_a_number_of_steps_or_a_share_of_all() -> None:
    run = schedule([5] * 40)  # 10 steps
    assert [run.every(setting, default=3) for setting in (None, 0.25, 0.01, 1, 4)] == [3, 2, 1, 1, 4]
    assert run.every(None, default=0) == 1
