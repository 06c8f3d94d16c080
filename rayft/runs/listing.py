"""`rayft runs list | show | rm`: what lies in a storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayft.errors import UsageError
from rayft.runs.folder import TRASH, RunFolder
from rayft.runs.reference import find, search_path
from rayft.runs.storage import Location, locate


@dataclass(frozen=True)
class RunSummary:
    """One line of `rayft runs list`. ``state`` is run.json's, or ``interrupted``: running, but nobody works on it."""

    name: str
    verb: str
    state: str
    created: str
    last_step: int | None
    path: str


def list_runs(storage: str | None = None) -> list[RunSummary]:
    """The runs of the storage, $RAYFT_STORAGE and ./runs, newest first; with those that --overwrite set aside."""
    found = []
    for place in search_path(storage):
        for child in place.children():
            if (child / "run.json").is_file():
                found.append(_summary_of(child))
    return sorted(found, key=lambda run: run.created, reverse=True)


def _summary_of(place: Location) -> RunSummary:
    """One damaged run, or one of a newer rayft, must not hide the others."""
    try:
        return summary(RunFolder.open(place))
    except UsageError as problem:
        return RunSummary(place.name, "?", f"unreadable ({problem.id})", "", None, str(place))


def summary(run: RunFolder) -> RunSummary:
    metrics = run.metrics()
    state: str = "interrupted" if run.state == "running" and not run.is_alive() else run.state
    if run.location.name.startswith(TRASH):
        state = f"set aside ({state})"
    step = metrics[-1]["step"] if metrics else None
    return RunSummary(run.name, run.record.verb, state, run.record.created, step, run.path)


def show_run(name: str, storage: str | None = None) -> dict[str, Any]:
    """One run as plain data: its record, complete checkpoints, last metrics. Raises UsageError R410."""
    run = find(name.removeprefix("run:"), storage)
    result = run.result()
    return {
        **run.record.model_dump(mode="json", by_alias=True),
        "state": summary(run).state,
        "path": run.path,
        "result": str(result) if result else None,
        "checkpoints": {str(step): path for step, path in run.checkpoints().items()},
        "last_metrics": run.metrics()[-1:],
    }


def remove_run(name: str, storage: str | None = None) -> str:
    """Delete a run for good and return its path; also one that `--overwrite` set aside, by its folder's name.

    The folder is renamed before it is deleted: an interruption leaves a `.trash-` folder, never half a run.
    Raises UsageError: R403 no run of ours, R406 a process works on it, R410 unknown.
    """
    if name.startswith(TRASH):
        aside = [place / name for place in search_path(storage) if (place / name / "run.json").is_file()]
        if not aside:
            raise UsageError("R410", f"there is no {name!r}", "`rayft runs list` names the folders")
        aside[0].remove()
        return str(aside[0])
    run = find(name.removeprefix("run:"), storage)
    path = run.path
    locate(run.set_aside()).remove()
    return path
