"""What is known of one trial while the sweep goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayft.config.recipe import Recipe
from rayft.tune.rows import State, TrialRow
from rayft.tune.space import Values

Verdict = Literal["continue", "stop", "leave"]
"""leave: save and give the trial back, and ask for the next one."""


@dataclass(frozen=True)
class Exploit:
    """A trial is to go on from the checkpoint that trial `donor` saved at `step`, with these values."""

    donor: int
    step: int
    values: Values


@dataclass(frozen=True)
class Proposal:
    """A trial to begin, or to take up again from a checkpoint. `recipe` is resolved and has no section `tune`."""

    number: int
    values: Values
    recipe: Recipe
    checkpoint: str | None = None
    exploit: Exploit | None = None
    """Whose weights it has taken over last."""


@dataclass
class Report:
    step: int
    metrics: dict[str, float]
    verdict: Verdict


@dataclass
class Record:
    number: int
    values: Values
    state: State = "waiting"
    lane: str = ""
    total_steps: int = 0
    checkpoint: tuple[str, int] | None = None
    """(path, step) of the latest one."""
    reports: list[Report] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    losses: int = 0
    """How often its lane died under it."""
    exploit: Exploit | None = None
    turns: int = 0
    """How often a lane has taken it."""
    seconds: float = 0.0
    since: float | None = None
    """When it was handed out, in seconds of the study's clock."""

    @property
    def last(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    @property
    def step(self) -> int:
        return self.last.step if self.last else 0

    @property
    def ended(self) -> bool:
        return self.state in ("complete", "pruned", "failed")

    def objective(self, metric: str) -> float | None:
        """The latest finite value of a metric or fact."""
        metrics: Mapping[str, Any] = self.last.metrics if self.last else {}
        value = metrics.get(metric, self.facts.get(metric))
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def hold(self, lane: str, now: float) -> None:
        """A lane takes it over."""
        self.state, self.lane, self.since = "running", lane, now
        self.turns += 1

    def release(self, state: State, now: float) -> None:
        """No lane has it any more."""
        if self.since is not None:
            self.seconds += now - self.since
        self.state, self.since = state, None

    def row(self, metrics: list[str], now: float) -> TrialRow:
        """As the table and the report see it; metrics: of the objectives."""
        last = dict(self.last.metrics) if self.last else {}
        found = {metric: value for metric in metrics if (value := self.objective(metric)) is not None}
        history = [(report.step, report.metrics[metrics[0]]) for report in self.reports if metrics[0] in report.metrics]
        return TrialRow(
            number=self.number,
            values=dict(self.values),
            state=self.state,
            step=self.step,
            total_steps=self.total_steps,
            metrics=last | found,
            facts=dict(self.facts),
            history=tuple(history),
            lane=self.lane,
            seconds=self.seconds + (now - self.since if self.since is not None else 0.0),
        )
