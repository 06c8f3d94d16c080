"""Which checkpoint a worker continues from, and its conversion when the number of ZeRO workers changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from rayft.errors import RunFailed
from rayft.runs import checkpoints
from rayft.runs.storage import Location, local_copy, locate

FACTS = "rayft.json"
"""Inside a checkpoint: step, workers, strategy and the state of what watches the run."""


@dataclass(frozen=True)
class Start:
    """Where an attempt starts. `folder` None: from scratch. `skipped`: the damaged checkpoints passed over, and why."""

    folder: str | None
    facts: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return int(self.facts.get("step", 0))


@dataclass(frozen=True)
class Diverged:
    """Checkpoints that a divergence has spoilt: those of attempts up to `attempt` from step `since` on."""

    since: int
    attempt: int

    def spoilt(self, facts: dict[str, Any]) -> bool:
        return facts["step"] >= self.since and facts["attempt"] <= self.attempt


def choose(candidates: Iterable[str], diverged: Diverged | None = None) -> Start:
    """The newest candidate that is whole and not spoilt by a divergence."""

    def good(place: Location) -> bool:
        return diverged is None or not diverged.spoilt(_facts(place))

    newest, skipped = checkpoints.newest_whole(map(locate, candidates), good)
    if newest is None:
        return Start(None, {}, tuple(skipped))
    return Start(_on_this_machine(newest), _facts(newest), tuple(skipped))


def _facts(place: Location) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((place / FACTS).read())
    return facts


def _on_this_machine(place: Location) -> str:
    """The folder itself, or a copy of it where it lies in a bucket (one download per node)."""
    return str(place) if place.is_local else local_copy(place, Path(_cached(place, "copy")))


def _cached(place: Location, kind: str) -> str:
    """Where this node keeps something made of a checkpoint: named after its content, as other runs have steps too."""
    manifests = b"".join(child.read() for child in place.children() if child.name.startswith("manifest-"))
    folder = os.path.join(tempfile.gettempdir(), "rayft-checkpoints")
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{place.name}-{kind}-{hashlib.sha256(manifests).hexdigest()[:16]}")


def universal(start: Start, workers: int, stage: int) -> str | None:
    """A ZeRO checkpoint that another number of workers wrote, in DeepSpeed's universal format; None if not needed.

    One process per node converts, the others wait for it. Raises RunFailed R611 when DeepSpeed's converter fails.
    """
    if start.folder is None or start.facts["workers"] == workers:
        return None
    target = _cached(locate(start.folder), "universal")
    with FileLock(f"{target}.lock"):
        if not os.path.isdir(target):
            _convert(start.folder, target, stage)
    return target


def _convert(source: str, target: str, stage: int) -> None:
    building = f"{target}.building"
    shutil.rmtree(building, ignore_errors=True)
    # The engine's own files (adapter, scheduler, trainer state) stay beside the converted optimiser states.
    shutil.copytree(source, building, ignore=shutil.ignore_patterns("global_step*"))
    with open(os.path.join(source, "latest")) as file:
        tag = file.read().strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += [
        "--input_folder",
        os.path.join(source, tag),
        "--output_folder",
        os.path.join(building, f"{tag}_universal"),
    ]
    if stage < 3:
        command.append("--inject_missing_state")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailed(
            "R611",
            f"the ZeRO checkpoint {source} could not be converted for another number of workers: {done.stderr[-800:]}",
            "resume with the number of workers that wrote it",
        )
    for name in ("latest", "latest_universal"):
        with open(os.path.join(building, name), "w") as file:
            file.write(f"{tag}_universal")
    os.replace(building, target)
