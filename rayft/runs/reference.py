"""References: ``run:NAME[@final|best|last|step-N|trial-N|round-N]`` or a folder, resolved to trained weights."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rayft.errors import UsageError
from rayft.home import home
from rayft.runs import checkpoints
from rayft.runs.content import content_hash
from rayft.runs.folder import RunFolder
from rayft.runs.storage import Location, local_copy, locate

Kind = Literal["adapter", "model"]
_REFERENCE = re.compile(r"run:(?P<name>[a-z0-9][a-z0-9._-]*)(?:@(?P<which>final|best|last|(?:step|trial|round)-\d+))?$")


@dataclass(frozen=True)
class AdapterRef:
    """Trained weights: a stock PEFT adapter or transformers model, with tokenizer and chat template beside it."""

    path: str
    """Absolute folder, or URI in a bucket (see `fetch`)."""
    kind: Kind
    base_hash: str | None = None
    """Hash of the base weights it was trained on; None for a folder outside a run."""
    run: str | None = None
    """Folder of the run it belongs to."""

    @cached_property
    def content_hash(self) -> str:
        """sha256 of tensors and configuration: what makes two adapters the same."""
        return content_hash(locate(self.path))

    def fetch(self) -> str:
        """A folder on this machine with the same content: the path itself, or a download from the bucket."""
        location = locate(self.path)
        return self.path if location.is_local else local_copy(location, home() / "adapters" / self.content_hash)


def resolve(ref: str, storage: str | None = None) -> AdapterRef:
    """The weights that a reference means.

    ``run:NAME`` is searched in ``storage`` (the recipe's), then in $RAYFT_STORAGE, then in ./runs; anything else is a
    folder or bucket URI that holds an adapter, a model or a run.

    Raises UsageError: R410 unknown run, R411 not a reference, R412 the run is not finished, R413 it has no such
    checkpoint, R414 the folder holds no weights.
    """
    name, which = parse(ref) if ref.startswith("run:") else (None, None)
    if name is not None:
        return _in_run(find(name, storage), which)
    location = locate(ref)
    if (location / "run.json").is_file():
        return _in_run(RunFolder.open(location), None)
    return _weights(location, RunFolder.open(location.parent) if (location.parent / "run.json").is_file() else None)


def on_this_machine(path: str) -> str:
    """The folder of weights that a resolved reference named, or its copy on this machine when it lies in a bucket."""
    return _weights(locate(path), None).fetch()


def parse(ref: str) -> tuple[str, str | None]:
    """(name, selector) of a ``run:`` reference. Raises UsageError R411."""
    match = _REFERENCE.match(ref)
    if not match:
        raise UsageError(
            "R411", f"{ref!r} is not a reference", "run:NAME, or run:NAME@final|best|last|step-N|trial-N|round-N"
        )
    return match["name"], match["which"]


def find(name: str, storage: str | None = None) -> RunFolder:
    """The run of that name in the first storage that has it. Raises UsageError R410 with the nearest names."""
    places = search_path(storage)
    for place in places:
        if (place / name / "run.json").is_file():
            return RunFolder.open(place / name)
    names = {child.name for place in places for child in place.children() if (child / "run.json").is_file()}
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    searched = ", ".join(map(str, places))
    hint = f"did you mean {' or '.join(near)}?" if near else "`rayft runs list` names the runs; or set storage=..."
    raise UsageError("R410", f"there is no run {name!r} in {searched}", hint)


def search_path(storage: str | None = None) -> list[Location]:
    """Where runs are looked for: the given storage, $RAYFT_STORAGE, ./runs; each once."""
    given = [storage, os.environ.get("RAYFT_STORAGE"), "runs"]
    return list({str(locate(place)): locate(place) for place in given if place}.values())


def _in_run(run: RunFolder, which: str | None) -> AdapterRef:
    if which in (None, "final"):
        result = run.result()
        if run.state != "finished" or result is None:
            raise _unfinished(run)
        return _weights(result, run)
    assert which is not None
    kind, _, number = which.partition("-")
    if kind in ("trial", "round"):
        return _weights(run.location / f"{kind}s" / number, run)
    found = {step: folder for step, folder in checkpoints.complete(run.location)}
    if kind == "best":
        step = run.record.facts.get("best_step")
    else:
        step = int(number) if kind == "step" else max(found, default=None)
    if step not in found:
        there = ", ".join(f"step-{step}" for step in found) or "none"
        raise UsageError("R413", f"run {run.name!r} has no checkpoint for @{which}", f"complete checkpoints: {there}")
    return _weights(found[step], run)


def _unfinished(run: RunFolder) -> UsageError:
    found = checkpoints.complete(run.location)
    state = run.state if run.state != "running" or run.is_alive() else "interrupted"
    if found:
        step = found[-1][0]
        hint = f"its last complete checkpoint is run:{run.name}@step-{step}; or finish it with --resume"
    else:
        hint = "it has no complete checkpoint yet; go on with --resume"
    return UsageError("R412", f"run {run.name!r} is not finished ({state})", hint)


def _weights(location: Location, run: RunFolder | None) -> AdapterRef:
    """The adapter or model in a folder, or in the ``adapter/`` or ``model/`` below it."""
    hashes = run.record.hashes if run else {}
    for folder in (location, location / "adapter", location / "model"):
        kind: Kind | None = None
        if (folder / "adapter_config.json").is_file():
            kind = "adapter"
        elif (folder / "config.json").is_file():
            kind = "model"
        if kind:
            return AdapterRef(str(folder), kind, hashes.get("base"), run.path if run else None)
    raise UsageError(
        "R414",
        f"{location} holds neither an adapter (adapter_config.json) nor a model (config.json)",
        "give the folder of an adapter, of a model or of a run",
    )
