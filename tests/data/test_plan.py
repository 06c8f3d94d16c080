"""The step plan: a step depends on (seed, epoch, global batch size) only, and each example is computed exactly once."""

from __future__ import annotations

from math import ceil

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayft.data.plan import FILLER, step_plan, worker_share

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_example_stands_in_exactly_one_step(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    steps = step_plan(lengths, batch, seed, epoch)
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert steps == step_plan(np.array(lengths), batch, seed, epoch)


def test_order_changes_with_seed_and_epoch_but_not_with_lengths() -> None:
    plan = step_plan([1] * 100, 8, seed=1, epoch=0)
    assert plan == step_plan(list(range(100)), 8, seed=1, epoch=0)
    assert plan != step_plan([1] * 100, 8, seed=2, epoch=0)
    assert plan != step_plan([1] * 100, 8, seed=1, epoch=1)
    assert [i for step in plan for i in step] == [i for step in step_plan([1] * 100, 5, 1, 0) for i in step]


@given(LENGTHS, st.integers(1, 20), st.integers(1, 7), st.integers(1, 9))
def test_union_over_workers_and_micro_batches_is_the_step(
    lengths: list[int], batch: int, workers: int, micro: int
) -> None:
    for step in step_plan(lengths, batch, seed=3, epoch=0):
        shares = [worker_share(step, lengths, workers, rank, micro, batch) for rank in range(workers)]
        rows = [row for share in shares for micro_batch in share for row in micro_batch]
        assert sorted(row for row in rows if row != FILLER) == sorted(step)
        for share in shares:
            assert len(share) == ceil(ceil(batch / workers) / micro)
            assert all(1 <= len(micro_batch) <= micro for micro_batch in share)
            assert all(FILLER not in micro_batch or micro_batch == [FILLER] for micro_batch in share)


@given(LENGTHS, st.integers(1, 4))
def test_tokens_are_balanced_between_workers(lengths: list[int], workers: int) -> None:
    step = list(range(len(lengths)))
    loads = [
        sum(lengths[row] for batch in worker_share(step, lengths, workers, rank, 1) for row in batch if row != FILLER)
        for rank in range(workers)
    ]
    if len(lengths) % workers == 0:
        assert max(loads) - min(loads) <= max(lengths)


def test_long_examples_go_to_different_workers() -> None:
    lengths = [100, 99, 1, 2]
    assert worker_share([0, 1, 2, 3], lengths, workers=2, rank=0, micro_batch_size=2) == [[0, 2]]
    assert worker_share([0, 1, 2, 3], lengths, workers=2, rank=1, micro_batch_size=2) == [[1, 3]]


def test_ragged_step_is_filled_not_doubled() -> None:
    shares = [worker_share([7, 3], [5] * 8, 4, rank, micro_batch_size=1, global_batch_size=8) for rank in range(4)]
    assert shares == [[[3], [FILLER]], [[7], [FILLER]], [[FILLER], [FILLER]], [[FILLER], [FILLER]]]
