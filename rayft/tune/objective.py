"""What a sweep minimises or maximises, and which of its trials are the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rayft.tune.rows import TrialRow


@dataclass(frozen=True)
class Objective:
    metric: str
    mode: Literal["min", "max"] = "min"

    def of(self, row: TrialRow) -> float | None:
        """The trial's latest value; None where there is none and where it is not finite."""
        return finite(row.metrics.get(self.metric))

    def cost(self, value: float) -> float:
        """Lower is better."""
        return value if self.mode == "min" else -value


def finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def ranking(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> list[TrialRow]:
    """Complete trials that have all objectives and break no constraint, the best by the first one first; the earlier
    trial wins a tie."""
    fit = [row for row in rows if row.state == "complete" and not row.facts.get("infeasible")]
    scored = [(cost, row) for row in fit if (cost := costs(row, objectives)) is not None]
    return [row for _, row in sorted(scored, key=lambda item: (item[0], item[1].number))]


def winners(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> list[TrialRow]:
    """The best trial; with several objectives the Pareto front, by the first of them: the trials that no other one
    beats in one objective without losing in another. Empty without a complete trial."""
    order = ranking(rows, objectives)
    if len(objectives) == 1:
        return order[:1]
    known = [costs(row, objectives) or () for row in order]
    return [row for row, cost in zip(order, known, strict=True) if not any(_dominates(other, cost) for other in known)]


def costs(row: TrialRow, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """One number per objective, lower is better; None unless all are known."""
    values = [objective.of(row) for objective in objectives]
    known = [objective.cost(value) for objective, value in zip(objectives, values, strict=True) if value is not None]
    return tuple(known) if len(known) == len(objectives) else None


def standing(rows: Sequence[TrialRow], objective: Objective) -> list[TrialRow]:
    """Complete and pruned trials with a value, the best first: complete ones by it, then pruned ones by how far they
    came and their last value, as Optuna's TPE ranks them. A pruned trial's value is of an earlier step, so it is not
    compared with a complete one's."""
    ended = [(row, objective.of(row)) for row in rows if row.state in ("complete", "pruned")]
    keyed = [
        ((row.state == "pruned", -row.step if row.state == "pruned" else 0, objective.cost(value), row.number), row)
        for row, value in ended
        if value is not None
    ]
    return [row for _, row in sorted(keyed, key=lambda item: item[0])]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
