"""The checkpoints of a run: ``<run>/checkpoints/<unique name>/``, found by their manifests, not by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rayft.runs import manifest
from rayft.runs.storage import Location

CHECKPOINTS = "checkpoints"


def name_of(step: int, attempt: int) -> str:
    """Folder name of a checkpoint. By name, checkpoints of one run are in the order of steps, then of attempts."""
    return f"step-{step:08d}-a{attempt:03d}"


def complete(run: Location) -> list[tuple[int, Location]]:
    """(step, folder) of every complete checkpoint by step; of those of one step the one saved last comes last."""
    saved = (run / CHECKPOINTS).folders()
    found = [(step, child) for child in saved if (step := manifest.step_of(child)) is not None]
    return sorted(found, key=lambda pair: pair[0])


def newest_whole(
    candidates: Iterable[Location], usable: Callable[[Location], bool] = lambda folder: True
) -> tuple[Location | None, list[str]]:
    """The newest candidate in which every byte is right and that is `usable`, and what is wrong with each damaged one
    that was passed over."""
    damaged = []
    for folder in sorted(candidates, key=lambda folder: folder.name, reverse=True):
        if problems := manifest.verify(folder):
            damaged.append(f"{folder.name}: {'; '.join(problems[:3])}")
        elif usable(folder):
            return folder, damaged
    return None, damaged
