"""The steps of a run: which examples each optimiser step takes, and what normalises its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rayft.config.recipe import Recipe
from rayft.data.examples import Examples
from rayft.data.plan import step_plan


@dataclass(frozen=True)
class StepSchedule:
    """All optimiser steps of a run, a pure function of (lengths, global_batch_size, seed, epochs | max_steps).

    Neither the number of workers nor the micro-batch size appears here: that is why both may change between two
    attempts of a run without a change of its curve.

    lengths: int32[n], tokens of each example. weight_sums: float64[n], sum of each example's loss weights.
    """

    lengths: np.ndarray
    weight_sums: np.ndarray
    global_batch_size: int
    seed: int
    epochs: float = 1
    max_steps: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, examples: Examples) -> StepSchedule:
        """The schedule of a recipe on its prepared training split."""
        return cls(
            lengths=examples.lengths,
            weight_sums=examples.weight_sums,
            global_batch_size=recipe.train.global_batch_size,
            seed=recipe.seed,
            epochs=recipe.train.epochs,
            max_steps=recipe.train.max_steps,
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @property
    def total_steps(self) -> int:
        return self.max_steps or max(1, math.ceil(self.epochs * self.steps_per_epoch))

    def examples(self, step: int) -> list[int]:
        """Indices of the examples of optimiser step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def weight(self, step: int) -> float:
        """Sum of loss weights over the global step: the denominator of its loss."""
        return float(self.weight_sums[self.examples(step)].sum())

    def tokens(self, step: int) -> int:
        """Real tokens of the global step."""
        return int(self.lengths[self.examples(step)].sum())

    def tokens_before(self, step: int) -> int:
        """Real tokens of all steps before `step`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * int(self.lengths.sum()) + sum(
            self.tokens(epoch * self.steps_per_epoch + s) for s in range(within)
        )

    def every(self, setting: float | None, default: int) -> int:
        """An interval in steps: null = default, below 1 = share of all steps, else steps."""
        if setting is None:
            return max(1, default)
        return max(1, round(setting * self.total_steps)) if setting < 1 else round(setting)

    def _epoch(self, epoch: int) -> list[list[int]]:
        return _epoch_plan(self.lengths.tobytes(), self.global_batch_size, self.seed, epoch)


@lru_cache(maxsize=4)
def _epoch_plan(lengths: bytes, global_batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    return step_plan(np.frombuffer(lengths, dtype=np.int32), global_batch_size, seed, epoch)
