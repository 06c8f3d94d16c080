"""One trial of a sweep as the table, the pictures and the report see it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["running", "waiting", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialRow:
    """A trial at one moment."""

    number: int
    values: Mapping[str, Any]
    """Dotted recipe path -> value as the recipe has it (a list stays a list). A conditional key that does not apply is
    absent."""
    state: State
    """waiting: begun or proposed, and in nobody's hands now. pruned: stopped at a rung. failed: no usable result."""
    step: int
    """Optimiser steps done."""
    total_steps: int
    """Optimiser steps of the full budget."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last evaluation: every scalar by name, among them the objectives."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """tokens_per_second, peak_memory_gb, trainable_parameters, and reason (why it failed), as far as they are known."""
    history: tuple[tuple[int, float], ...] = ()
    """(step, value of the first objective) of each evaluation, in order."""
    lane: str = ""
    seconds: float = 0.0
    """Training time so far, waiting left out."""

    @property
    def ended(self) -> bool:
        return self.state in ("complete", "pruned", "failed")


def value_of(row: TrialRow, metric: str) -> float | None:
    """The trial's latest value of a metric; None without one and where it is not finite."""
    value = row.metrics.get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def ranked(rows: Sequence[TrialRow], metric: str, mode: str) -> list[TrialRow]:
    """Complete trials with a finite value, the best first; the earlier trial wins a tie. `mode`: "min" or "max"."""
    sign = -1.0 if mode == "max" else 1.0
    scored = [
        (sign * value, row.number, row)
        for row in rows
        if row.state == "complete"
        if (value := value_of(row, metric)) is not None
    ]
    return [row for _, _, row in sorted(scored, key=lambda item: item[:2])]
