"""One trial of a sweep as the table, the pictures and the report see it."""

from __future__ import annotations

from collections.abc import Mapping
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
