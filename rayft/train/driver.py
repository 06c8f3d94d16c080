"""`fit`: one recipe in, one finished run out."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rayft import config
from rayft.config.recipe import Recipe
from rayft.errors import RayftError, RunStopped
from rayft.runs.folder import Mode, RunFolder
from rayft.runs.storage import check_writable, locate
from rayft.runtime.stopping import in_thread, stoppable

if TYPE_CHECKING:
    from rich.console import Console

    from rayft.train.launch import Launcher
    from rayft.train.preparation import Preparation

ANSWER = "rayft.evaluate.answers:answer"
"""Import path of the function that generates at evaluations. A path, because training knows nothing of inference."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished training run. `metrics`: the last value of each scalar, such as loss and validation_loss."""

    path: str
    name: str
    kind: Literal["adapter", "model"]
    metrics: dict[str, Any] = field(default_factory=dict)
    state: str = "finished"

    @property
    def folder(self) -> str:
        """The stock PEFT adapter or transformers model."""
        return str(locate(self.path) / self.kind)

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer), ready to generate."""
        from rayft.models.save import load_trained
        from rayft.runs.reference import on_this_machine

        return load_trained(on_this_machine(self.folder))


class Watcher(Protocol):
    """Somebody who follows a run while it goes on, such as a sweep. Called in a thread of its own."""

    def begun(self, total_steps: int, trainable_parameters: int) -> None:
        """An attempt has begun."""
        ...

    def evaluated(self, row: Mapping[str, Any]) -> bool:
        """A row of metrics with an evaluation (any row, where nothing is held out); True asks the run to stop."""
        ...


@dataclass(frozen=True)
class Clone:
    """Weights, optimiser and step of another run, from which a new one goes on with rates and decay of its own."""

    checkpoint: str
    """Its folder, or URI."""
    parent: str
    """What the new run's record says of where it comes from."""


def fit(
    source: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Sequence[str] = (),
    *,
    mode: Mode = "fail",
    answer: str | None = ANSWER,
    console: Console | None = None,
    quiet: bool = False,
    watcher: Watcher | None = None,
    clone: Clone | None = None,
) -> TrainResult:
    """Train what a recipe says and leave a run.

    source: YAML file, run folder, plain data or Recipe; overrides: `section.key=value`. mode: what to do when the run's
    name is in use (fail, resume, overwrite, new). answer: import path of the function that generates at evaluations, or
    None. watcher: hears of evaluations and may end the run. clone: where a new run goes on from. Raises UsageError
    before anything starts when the user can fix it, RunFailed when the run could not end, and RunStopped when it was
    asked to stop and has saved.
    """
    resolved = config.load(source, overrides)
    recipe = resolved.recipe
    check_writable(locate(recipe.storage))
    folder = RunFolder.taken_up(resolved, "train", mode)
    if folder is not None and folder.state == "finished":
        folder.release()
        return result_of(folder)

    from rayft.train.preparation import prepare

    try:
        prepared = prepare(recipe)
        if folder is None:
            folder = RunFolder.create(resolved, "train", mode, parent=clone.parent if clone else None)
            if clone is not None:
                folder.adopt(clone.checkpoint)
    except BaseException:
        if folder is not None:
            folder.finish("stopped")  # nothing was lost: it can be resumed as before
        raise
    with folder:
        return _run(folder, prepared, answer, console, quiet, watcher)


def _run(
    folder: RunFolder,
    prepared: Preparation,
    answer: str | None,
    console: Console | None,
    quiet: bool,
    watcher: Watcher | None,
) -> TrainResult:
    from rayft.train.attempts import run_to_end
    from rayft.train.finish import chosen_step, export
    from rayft.train.launch import LocalLauncher, RayLauncher
    from rayft.train.progress import Progress

    recipe, settled = prepared.recipe, prepared.settled
    folder.pin(base=settled.base_hash, data=settled.data_hash, template=settled.template_hash)
    launcher: Launcher = (
        LocalLauncher(folder, recipe) if prepared.placement is None else RayLauncher(folder, recipe, prepared.placement)
    )
    began = time.time()
    job = prepared.job(folder, answer)
    progress = Progress(prepared.schedule.total_steps, console, quiet=quiet)
    try:
        with (
            _shown(progress, launcher),
            stoppable(lambda: launcher.recording.tell("request_stop")),
            _followed(watcher, launcher, recipe),
        ):
            facts = in_thread(
                lambda: run_to_end(launcher, folder, job, recipe.scale.max_failures, recipe.train.on_divergence)
            )
        folder.index_checkpoints()
        facts["seconds"] = time.time() - began
        if facts["stopped"]:
            raise RunStopped(
                "R606", f"run {folder.name!r} was stopped at step {facts['step']} and saved", "--resume goes on"
            )
        facts["result_step"] = chosen_step(facts, recipe.train.load_best_model_at_end)
        facts["kind"] = export(folder, facts["result_step"], settled.dtype)
        _report(folder, launcher, prepared, facts)
    except RayftError:
        _report(folder, launcher, prepared, {"seconds": time.time() - began})
        raise
    finally:
        launcher.close()
    folder.finish("finished", **facts)
    return result_of(folder)


def _report(folder: RunFolder, launcher: Launcher, prepared: Preparation, facts: dict[str, Any]) -> None:
    """Write the report. What goes wrong there costs neither a trained model nor the error that ended the run."""
    from rayft.train.finish import report

    try:
        report(folder, launcher.recording, prepared.data.stats, facts)
    except Exception as error:
        logger.warning("report.md of run %r could not be written: %s: %s", folder.name, type(error).__name__, error)


def result_of(folder: RunFolder) -> TrainResult:
    """The result of a finished run."""
    rows = folder.metrics()
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    return TrainResult(folder.path, folder.name, folder.record.facts["kind"], last, folder.state)


# While it runs


@contextmanager
def _shown(progress: Any, launcher: Launcher) -> Iterator[None]:
    """Show the recorder's news, from now on, in a thread of their own."""
    ended = threading.Event()
    start = launcher.recording.ask("snapshot", sys.maxsize)["cursor"]

    def poll(since: int) -> dict[str, Any]:
        return launcher.recording.ask("snapshot", max(since, start))

    thread = threading.Thread(target=progress.run, args=(poll, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


@contextmanager
def _followed(watcher: Watcher | None, launcher: Launcher, recipe: Recipe) -> Iterator[None]:
    """Pass the recorder's news on to the watcher, in a thread of their own; its error ends the run and is raised."""
    if watcher is None:
        yield
        return
    from rayft.train.follow import Follower

    follower = Follower(
        watcher, launcher.recording, "validation_loss" if recipe.data.validation is not None else "loss"
    )
    thread = threading.Thread(target=follower.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        follower.ended.set()
        thread.join()
        if follower.error is not None:
            raise follower.error
