"""What stays when a sweep has ended: the winner's weights and recipe, Tune's experiment, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rayft import config
from rayft.config.recipe import Recipe
from rayft.errors import RunFailed
from rayft.runs.folder import CHECKPOINTS, RunFolder
from rayft.runs.storage import is_committed, locate
from rayft.tune import experiment
from rayft.tune.objective import Objective, winners
from rayft.tune.outcome import Outcome, Speed
from rayft.tune.plan import Plan
from rayft.tune.repeats import Repeat
from rayft.tune.report import save_report
from rayft.tune.rows import TrialRow
from rayft.tune.worker import STATE

BEST = "best.yaml"
TRIALS = "trials.json"


def objectives(plan: Plan) -> tuple[Objective, ...]:
    return tuple(Objective(metric, mode) for metric, mode in plan.tune.objectives)


def mirror(folder: RunFolder, rows: Sequence[TrialRow]) -> None:
    """Write the trials as they stand: as Ray Tune's experiment, and as trials.json."""
    experiment.write(folder.path, rows, folder.metrics())
    folder.write_json(TRIALS, [asdict(row) for row in rows])


def kept_rows(folder: RunFolder) -> list[TrialRow]:
    """The trials of a sweep that has ended."""
    plain = folder.read_json(TRIALS) or []
    return [TrialRow(**row | {"history": tuple(map(tuple, row["history"]))}) for row in plain]


def best_of(rows: Sequence[TrialRow], plan: Plan) -> TrialRow:
    """The winner. Raises RunFailed R740 when no trial has a result."""
    best = winners(rows, objectives(plan))
    if best:
        return best[0]
    reasons = [f"trial {row.number}: {row.facts['reason']}" for row in rows if "reason" in row.facts]
    broken = [
        f"trial {row.number} breaks {', '.join(row.facts['infeasible'])}" for row in rows if row.facts.get("infeasible")
    ]
    states = ", ".join(f"{row.number} {row.state}" for row in rows)
    raise RunFailed(
        "R740",
        f"no trial ended with a result ({'; '.join([*reasons, *broken][:3]) or states})",
        "try one trial with `rayft train`, or widen tune.space",
    )


def best_recipe(folder: RunFolder, plan: Plan, best: TrialRow) -> Recipe:
    """The winner's recipe under a name of its own; written as best.yaml."""
    plain = plan.space.recipe(best.values).model_dump(mode="json", exclude={"tune"})
    resolved = config.load(plain | {"name": f"{folder.name}-best"})
    heading = f"# Trial {best.number} of the sweep {folder.name}."
    if "taken_over" in best.facts:
        heading += "\n# The last values of a schedule: trial by trial, report.md says what it took over and when."
    folder.write_file(BEST, f"{heading}\n{resolved.to_yaml()}")
    return resolved.recipe


def keep_weights(folder: RunFolder, best: TrialRow) -> Literal["adapter", "model"]:
    """Copy the winner's weights to the top of the run: `run:NAME` is its best trial."""
    trial = folder.location / "trials" / str(best.number)
    kind: Literal["adapter", "model"] = "adapter" if is_committed(trial / "adapter") else "model"
    with folder.writing(kind) as target:
        (trial / kind).copy_to(locate(target))
        (target / ".complete").unlink(missing_ok=True)
    return kind


def remove_checkpoints(folder: RunFolder, rows: Sequence[TrialRow]) -> None:
    """Those of a population, whose trials have kept them for each other, and of lanes that died at a trial's end."""
    for row in rows:
        trial = folder.location / "trials" / str(row.number)
        for left in (CHECKPOINTS, STATE):
            (trial / left).remove()


def report(
    folder: RunFolder,
    plan: Plan,
    rows: Sequence[TrialRow],
    best: Recipe | None,
    *,
    owner: Any,
    seconds: float,
    repeats: Sequence[Repeat] = (),
) -> None:
    """Write report.md and its pictures, also of a sweep that was stopped."""
    save_report(
        folder,
        Outcome(
            name=folder.name,
            path=folder.path,
            start=plan.recipe,
            best=best,
            objectives=objectives(plan),
            rows=tuple(rows),
            distributions=owner.distributions(),
            mode=plan.chosen.mode,
            reason=plan.chosen.reason,
            settings=plan.settings(),
            seconds=seconds,
            rungs=tuple(owner.milestones()),
            speed=_speed(owner),
            repeats=tuple(repeats),
            events=tuple(owner.events()),
        ),
    )


def _speed(owner: Any) -> Speed | None:
    """Steps of the sweep against those of one trial after another on the same lanes."""
    speeds: tuple[float, float] | None = owner.speeds()
    if speeds is None:
        return None
    together, alone = speeds
    return Speed(together, alone, "a trial alone in its pack, in the first steps of the sweep")
