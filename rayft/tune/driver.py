"""`search`: one recipe in, its best trial out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft import config
from rayft.config.recipe import Recipe
from rayft.errors import RayftError, RunStopped, UsageError
from rayft.runs.folder import Mode, RunFolder
from rayft.runs.storage import check_writable, locate
from rayft.runtime.stopping import in_thread, stoppable
from rayft.tune.rows import TrialRow

if TYPE_CHECKING:
    from ray.tune import ResultGrid
    from rich.console import Console

    from rayft.tune.plan import Plan

MIRROR_SECONDS = 5.0
"""Between two looks whether a trial has ended, for Ray Tune's experiment."""


@dataclass(frozen=True)
class TuneResult:
    """A finished sweep. `metrics`: the best trial's last evaluation."""

    path: str
    name: str
    best: int
    """Number of the best trial."""
    kind: str
    """adapter or model."""
    metrics: Mapping[str, float]
    best_recipe: Recipe
    rows: Sequence[TrialRow]
    objectives: Sequence[tuple[str, str]]
    state: str = "finished"

    @property
    def folder(self) -> str:
        """The best trial's weights: stock PEFT adapter or transformers model."""
        return str(locate(self.path) / self.kind)

    @property
    def report(self) -> str:
        return str(locate(self.path) / "report.md")

    @property
    def result_grid(self) -> ResultGrid:
        """All trials as Ray Tune's result."""
        from rayft.tune.experiment import read

        return read(self.path, *self.objectives[0])


def search(
    source: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Sequence[str] = (),
    *,
    mode: Mode = "fail",
    dashboard: bool = False,
    console: Console | None = None,
    quiet: bool = False,
) -> TuneResult:
    """Search what the section `tune` of a recipe says and leave a run whose result is the best trial.

    source: YAML file, run folder, plain data or Recipe; overrides: `section.key=value`. mode: what to do when the run's
    name is in use. dashboard: start Optuna Dashboard on the study. Raises UsageError before anything starts when the
    user can fix it, RunFailed when no trial has a result or lanes keep dying, RunStopped when it was asked to stop.
    """
    require_optuna()
    resolved = config.load(source, overrides)
    recipe = resolved.recipe
    check_writable(locate(recipe.storage))
    _check_study(recipe)
    taken = RunFolder.taken_up(resolved, "tune", mode)
    if taken is not None and taken.state == "finished":
        taken.release()
        return _result_of(taken)

    from rayft.tune.plan import make

    try:
        plan = make(resolved)
        folder = taken or RunFolder.create(plan.asked, "tune", mode)
    except BaseException:
        if taken is not None:
            taken.finish("stopped")
        raise
    with folder:
        return _run(folder, plan, resume=taken is not None, dashboard=dashboard, console=console, quiet=quiet)


def require_optuna() -> None:
    """Raises UsageError R733 where the packages of a sweep are not installed."""
    missing = [name for name in ("optuna", "pandas") if find_spec(name) is None]
    if missing:
        raise UsageError("R733", f"sweeps need {' and '.join(missing)}", "pip install 'rayft[tune]'")


def _check_study(recipe: Recipe) -> None:
    """Raises UsageError R734 for a bucket and a study that is a file."""
    tune = recipe.tune
    if not locate(recipe.storage).is_local and not (tune and tune.study_storage):
        raise UsageError(
            "R734",
            f"the study is a journal file by default, and the storage {recipe.storage} is a bucket, which has no files",
            "tune.study_storage=postgresql://host/db keeps the study elsewhere; or take a folder as storage",
        )


def _run(
    folder: RunFolder, plan: Plan, *, resume: bool, dashboard: bool, console: Console | None, quiet: bool
) -> TuneResult:
    from rayft.tune import finish, launch
    from rayft.tune.dashboard import running
    from rayft.tune.display import Display

    settled = plan.prepared.settled
    folder.pin(base=settled.base_hash, data=settled.data_hash, template=settled.template_hash)
    owner = launch.open_study(plan, folder, resume=resume)
    began, before = time.time(), float(folder.record.facts.get("seconds", 0.0))

    def seconds() -> float:
        return before + time.time() - began

    display = Display(folder.name, finish.objectives(plan), owner.limit(), console, quiet=quiet)
    display.say(f"{plan.chosen.mode}: {plan.chosen.reason}", "dim")
    shown = running(plan.tune, folder, display.say) if dashboard else nullcontext()
    try:
        with shown, _displayed(display, owner), stoppable(lambda: threading.Thread(target=owner.request_stop).start()):
            in_thread(
                lambda: launch.run_lanes(plan, folder, owner, launch.trials_left(owner)),
                meanwhile=_mirror(folder, owner),
            )
        owner.flush()
        rows = owner.rows()
        finish.mirror(folder, rows)
        if owner.stopping() and any(not row.ended for row in rows):
            raise RunStopped("R742", f"sweep {folder.name!r} was stopped; every trial is saved", "--resume goes on")
        best = finish.best_of(rows, plan)
        recipe = finish.best_recipe(folder, plan, best)
        kind = finish.keep_weights(folder, best)
        finish.remove_checkpoints(folder, rows)
        repeats = _repeat(folder, plan, rows) if plan.tune.repeats else []
        finish.report(folder, plan, rows, recipe, owner=owner, seconds=seconds(), repeats=repeats)
    except RayftError:
        folder.note(seconds=seconds())
        finish.report(folder, plan, owner.rows(), None, owner=owner, seconds=seconds())
        raise
    finally:
        launch.close_study(owner)
    objectives = [list(pair) for pair in plan.tune.objectives]
    facts = {"kind": kind, "best_trial": best.number, "metrics": dict(best.metrics), "objectives": objectives}
    folder.finish("finished", seconds=seconds(), mode=plan.chosen.mode, **facts)
    return _result(folder, recipe, rows)


def _repeat(folder: RunFolder, plan: Plan, rows: Sequence[TrialRow]) -> list[Any]:
    """Train the best trials with further seeds. What an interrupted driver had finished is in run.json."""
    from rayft.tune import launch
    from rayft.tune.again import TRIALS, Again, repeats_of
    from rayft.tune.finish import objectives
    from rayft.tune.objective import ranking

    best = ranking(rows, objectives(plan))[:TRIALS]
    known = {int(number): value for number, value in folder.record.facts.get("repeats", {}).items()}
    trials = [(row.number, dict(row.values), plan.space.recipe(row.values)) for row in best]
    owner = launch.shared(plan, folder, Again(trials, plan.tune.repeats, plan.tune.objectives[0][0], known))
    try:
        if owner.limit():
            launch.run_lanes(plan, folder, owner, owner.limit())
    finally:
        known = owner.known()
        folder.note(repeats={str(number): value for number, value in known.items()})
        launch.close_study(owner)
    for number in known:
        (folder.location / "trials" / str(number)).remove()
    return repeats_of(known)


def _result(folder: RunFolder, best_recipe: Recipe, rows: Sequence[TrialRow]) -> TuneResult:
    facts = folder.record.facts
    return TuneResult(
        path=folder.path,
        name=folder.name,
        best=facts["best_trial"],
        kind=facts["kind"],
        metrics=facts["metrics"],
        best_recipe=best_recipe,
        rows=rows,
        objectives=[(metric, mode) for metric, mode in facts["objectives"]],
        state=folder.state,
    )


def _result_of(folder: RunFolder) -> TuneResult:
    """The result of a sweep that has finished before."""
    from rayft.config.document import Document
    from rayft.tune.finish import BEST, kept_rows

    document = Document.parse((folder.location / BEST).read().decode(), BEST)
    return _result(folder, config.load(document.data).recipe, kept_rows(folder))


# While it runs


def _mirror(folder: RunFolder, owner: Any) -> Callable[[], None]:
    """What keeps Ray Tune's experiment up to date when called now and then: each trial that has ended is in it."""
    from rayft.tune.finish import mirror

    ended, looked = -1, time.monotonic()

    def look() -> None:
        nonlocal ended, looked
        if time.monotonic() - looked <= MIRROR_SECONDS:
            return
        looked = time.monotonic()
        rows = owner.rows()
        if sum(row.ended for row in rows) != ended:
            ended = sum(row.ended for row in rows)
            owner.flush()
            mirror(folder, rows)

    return look


@contextmanager
def _displayed(display: Any, owner: Any) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=display.run, args=(owner.rows, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
