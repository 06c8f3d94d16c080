"""Which examples make up each optimiser step, and which of them one worker takes.

The examples of a step depend on (seed, epoch, global_batch_size) and on nothing else: not on the number of workers,
not on the micro batch, not on where a run was interrupted. Nothing is dropped and nothing is doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

FILLER = -1
"""Index of the row without weight that stands where a worker has no example: ``Examples[-1]``."""


def step_plan(lengths: Sequence[int] | np.ndarray, global_batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The optimiser steps of one epoch: each a list of example indices, each index exactly once.

    ``lengths`` holds the tokens per example; only its length is used. All steps have ``global_batch_size`` examples
    but the last, which has what is left.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
    return [order[start : start + global_batch_size] for start in range(0, len(order), global_batch_size)]


def worker_share(
    step: Sequence[int],
    lengths: Sequence[int] | np.ndarray,
    workers: int,
    rank: int,
    micro_batch_size: int,
    global_batch_size: int | None = None,
) -> list[list[int]]:
    """The micro-batches of one step that worker ``rank`` of ``workers`` computes.

    Always ``ceil(ceil(global_batch_size / workers) / micro_batch_size)`` micro-batches of 1 to ``micro_batch_size``
    rows, so that all workers take part in the same number of collectives. Examples are spread so that workers, and
    then the micro-batches of a worker, hold about the same number of tokens. A micro-batch that gets no example (ragged
    last step, more workers than examples) is ``[FILLER]``. ``global_batch_size`` defaults to the length of the step.
    """
    rows_per_worker = ceil((global_batch_size or len(step)) / workers)
    micro_batches = ceil(rows_per_worker / micro_batch_size)
    mine = _balance(step, lengths, bins=workers, capacity=rows_per_worker)[rank]
    shares = _balance(mine, lengths, bins=micro_batches, capacity=micro_batch_size)
    return [share or [FILLER] for share in shares]


def _balance(items: Sequence[int], lengths: Sequence[int] | np.ndarray, bins: int, capacity: int) -> list[list[int]]:
    """Longest first, each into the bin with the fewest tokens that still has room (Graham's LPT rule)."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    tokens = [0] * bins
    for item in sorted(items, key=lambda item: (-int(lengths[item]), item)):
        free = (index for index in range(bins) if len(filled[index]) < capacity)
        best = min(free, key=lambda index: (tokens[index], index))
        filled[best].append(item)
        tokens[best] += int(lengths[item])
    return filled
