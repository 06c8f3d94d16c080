"""The best trials with other seeds: what lanes see of it."""

from __future__ import annotations

import math

import pytest

from rayft.tune.again import STRIDE, Again, repeats_of
from tests.tune.conftest import sweep


def again(known: dict[int, float] | None = None) -> Again:
    recipe = sweep().recipe
    trials = [(4, {"adapter.rank": 4}, recipe), (1, {"adapter.rank": 8}, recipe)]
    return Again(trials, 2, "validation_loss", known or {})


def test_every_trial_with_every_seed() -> None:
    queue = again()
    assert queue.limit() == 4 and queue.milestones() == []
    seen = []
    while (proposal := queue.next("lane-0")) is not None:
        seen.append((proposal.number, proposal.recipe.seed, proposal.values["adapter.rank"]))
        queue.begun(proposal.number, 9, trainable_parameters=1)
        assert queue.report(proposal.number, 3, {"validation_loss": 9.0}) == "continue"
        queue.report(proposal.number, 9, {"validation_loss": proposal.number / STRIDE})
        queue.finish(proposal.number, "complete", {}, {})
    assert seen == [(STRIDE + 4, 4, 4), (2 * STRIDE + 4, 5, 4), (STRIDE + 1, 4, 8), (2 * STRIDE + 1, 5, 8)]
    repeats = repeats_of(queue.known())
    assert [repeat.trial for repeat in repeats] == [4, 1]
    assert repeats[0].values == pytest.approx((1.000004, 2.000004))


def test_failed_and_known_ones() -> None:
    queue = again({STRIDE + 4: 0.5})
    assert queue.limit() == 3
    proposal = queue.next("lane-0")
    assert proposal is not None and proposal.number == 2 * STRIDE + 4
    queue.finish(proposal.number, "failed", {}, {"reason": "x"})
    found = queue.known()
    assert found[STRIDE + 4] == 0.5 and math.isnan(found[2 * STRIDE + 4])


def test_a_dead_lane_s_repeats_go_on() -> None:
    queue = again()
    first = queue.next("lane-0")
    other = queue.next("lane-1")
    assert first is not None and other is not None
    queue.checkpointed(first.number, "/state", 3)
    queue.lost("lane-0")
    back = queue.next("lane-1")
    assert back is not None and (back.number, back.checkpoint) == (first.number, "/state")
