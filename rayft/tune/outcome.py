"""What the driver knows of a sweep when it has ended or was stopped: what the report is written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.distributions import BaseDistribution

from rayft.config.recipe import Recipe
from rayft.tune.objective import Objective
from rayft.tune.repeats import Repeat
from rayft.tune.rows import TrialRow


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the whole sweep, and of its trials one after another."""

    tokens_per_second: float
    sequential: float
    basis: str
    """How `sequential` was measured: "3 steps of one trial alone"."""


@dataclass(frozen=True)
class Outcome:
    name: str
    path: str
    start: Recipe
    """The recipe that the sweep was started with."""
    best: Recipe | None
    """The winner's, as `best.yaml` has it; None without a winner."""
    objectives: tuple[Objective, ...]
    rows: tuple[TrialRow, ...]
    distributions: Mapping[str, BaseDistribution]
    """Recipe path -> the study's distribution."""
    mode: Literal["pack", "classic"]
    reason: str
    """Why this mode, as a sentence without its full stop."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else to list, by name: search, early stopping, lanes, adapters per pack."""
    seconds: float = 0.0
    """Wall time, over all sessions."""
    rungs: tuple[float, ...] = ()
    """Optimiser steps at which trials could be stopped."""
    speed: Speed | None = None
    repeats: tuple[Repeat, ...] = ()
    events: tuple[str, ...] = ()
    """What went wrong on the way and was survived, as sentences."""
