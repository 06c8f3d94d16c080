"""The micro-batches of one worker, in the order of the run's steps, and its share of a validation split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from rayft.data.collate import collate
from rayft.data.examples import Examples
from rayft.data.plan import worker_share
from rayft.data.schedule import StepSchedule

MICRO_TOKENS = {"cpu": 4096, "gpu": 16384}
"""Tokens of one forward pass that `micro_batch_size: auto` starts from; out-of-memory halves it."""


class MicroBatches(Sampler[list[int]]):
    """Index lists of every micro-batch of a run, flat: `micro_steps` of them make one optimiser step.

    The whole run is one pass, so that a resume is one skip, whatever epoch it falls into.
    """

    def __init__(self, schedule: StepSchedule, workers: int, rank: int, micro_batch_size: int) -> None:
        self.schedule, self.workers, self.rank, self.micro_batch_size = schedule, workers, rank, micro_batch_size
        self.micro_steps = micro_steps(schedule.global_batch_size, workers, micro_batch_size)

    def __len__(self) -> int:
        return self.schedule.total_steps * self.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.schedule.total_steps):
            yield from self.of_step(step)

    def of_step(self, step: int, rank: int | None = None) -> list[list[int]]:
        """Micro-batches of one step, of this worker or of another."""
        schedule = self.schedule
        return worker_share(
            schedule.examples(step),
            schedule.lengths,
            self.workers,
            self.rank if rank is None else rank,
            self.micro_batch_size,
            schedule.global_batch_size,
        )

    def padding(self, step: int) -> int:
        """Padding tokens of the global step where micro-batches are padded, over all workers."""
        lengths = self.schedule.lengths
        return sum(
            int(lengths[batch].max() * len(batch) - lengths[batch].sum())
            for rank in range(self.workers)
            for batch in self.of_step(step, rank)
            if batch[0] >= 0
        )


def micro_steps(global_batch_size: int, workers: int, micro_batch_size: int) -> int:
    """Forward passes of one worker per optimiser step."""
    return math.ceil(math.ceil(global_batch_size / workers) / micro_batch_size)


def micro_batch_size(wanted: int | Literal["auto"], schedule: StepSchedule, workers: int, device: str) -> int:
    """Examples per forward pass: those the recipe wants, or as many of the longest as MICRO_TOKENS holds."""
    share = math.ceil(schedule.global_batch_size / workers)
    if wanted != "auto":
        return min(wanted, share)
    return max(1, min(share, MICRO_TOKENS[device] // int(schedule.lengths.max())))


def validation_batches(
    examples: Examples, workers: int, rank: int, size: int, *, padding_free: bool, pad_token_id: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This worker's share of a split in batches of `size`; all workers get equally many, filled with rows of weight 0.

    Sorted by length, so that padded batches waste little.
    """
    order: list[int] = np.argsort(examples.lengths, kind="stable").tolist()
    for start in range(0, len(order), size * workers):
        indices = order[start + rank : start + size * workers : workers]
        indices += [-1] * (min(size, math.ceil(len(order[start : start + size * workers]) / workers)) - len(indices))
        yield collate([examples[i] for i in indices], padding_free=padding_free, pad_token_id=pad_token_id)
