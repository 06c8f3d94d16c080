"""The best trials again with other seeds, handed to the same lanes as the sweep's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayft.config.recipe import Recipe
from rayft.tune.record import Proposal, Record, Verdict
from rayft.tune.repeats import Repeat
from rayft.tune.rows import TrialRow
from rayft.tune.space import Values
from rayft.tune.study import Ended

TRIALS = 3
"""So many of the best are repeated."""
STRIDE = 1_000_000
"""Repeat n of trial t has the number (n + 1) * STRIDE + t, so it has a folder of its own among the trials."""


class Again:
    """What lanes ask of a `Study`, for a fixed list of trials that run to their ends."""

    def __init__(
        self, trials: Sequence[tuple[int, Values, Recipe]], seeds: int, metric: str, known: Mapping[int, float]
    ) -> None:
        """trials: (number, values, recipe) of each; seeds: further ones for each; known: number of a repeat -> value,
        of those that an interrupted driver had finished."""
        self._metric = metric
        self._known = dict(known)
        self._recipes: dict[int, Recipe] = {}
        self._records: dict[int, Record] = {}
        self._stopping = False
        for number, values, recipe in trials:
            for n in range(seeds):
                again = (n + 1) * STRIDE + number
                self._recipes[again] = recipe.model_copy(update={"seed": (recipe.seed + n + 1) % 2**32})
                if again not in self._known:
                    self._records[again] = Record(again, values)

    def next(self, lane: str) -> Proposal | None:
        for record in self._records.values():
            if record.state == "waiting":
                record.hold(lane, 0.0)
                checkpoint = record.checkpoint[0] if record.checkpoint else None
                return Proposal(record.number, record.values, self._recipes[record.number], checkpoint)
        return None

    def begun(self, number: int, total_steps: int, **facts: Any) -> None:
        self._records[number].total_steps = total_steps

    def report(self, number: int, step: int, metrics: Mapping[str, float]) -> Verdict:
        self._records[number].facts |= {name: value for name, value in metrics.items() if name == self._metric}
        return "continue"

    def checkpointed(self, number: int, path: str, step: int) -> None:
        self._records[number].checkpoint = (path, step)

    def finish(self, number: int, state: Ended, metrics: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        record = self._records[number]
        record.facts |= {name: value for name, value in facts.items() if name == self._metric}
        record.release(state, 0.0)
        value = record.objective(self._metric)
        self._known[number] = value if state == "complete" and value is not None else math.nan

    def give_back(self, number: int) -> None:
        self._records[number].release("waiting", 0.0)

    def lost(self, lane: str) -> None:
        for record in self._records.values():
            if record.state == "running" and record.lane == lane:
                record.release("waiting", 0.0)

    def stopping(self) -> bool:
        return self._stopping

    def request_stop(self) -> None:
        self._stopping = True

    def event(self, text: str) -> None:
        """The sweep is over; its report says what went wrong in it."""

    def measured(self, together: float, alone: float | None) -> None:
        """As for `event`."""

    def milestones(self) -> list[float]:
        return []

    def rows(self) -> list[TrialRow]:
        return [record.row([self._metric], 0.0) for record in self._records.values()]

    def limit(self) -> int:
        return len(self._records)

    def known(self) -> dict[int, float]:
        """Number of a repeat -> value of the objective; nan where it failed."""
        return dict(self._known)

    def close(self) -> None:
        """Nothing is held."""


def repeats_of(known: Mapping[int, float]) -> list[Repeat]:
    """Per trial, in the order in which they were repeated."""
    trials = dict.fromkeys(number % STRIDE for number in known)
    return [
        Repeat(trial, tuple(value for number, value in sorted(known.items()) if number % STRIDE == trial))
        for trial in trials
    ]
