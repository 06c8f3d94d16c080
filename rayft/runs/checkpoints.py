"""The checkpoints of a run: ``<run>/checkpoints/<unique name>/``, found by their manifests, not by their names."""

from __future__ import annotations

import logging

from rayft.runs import manifest
from rayft.runs.storage import Location

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


def complete(run: Location) -> list[tuple[int, Location]]:
    """(step, folder) of every complete checkpoint by step; of those of one step the one saved last comes last."""
    saved = (run / CHECKPOINTS).folders()  # Ray's names carry the time, so they are in the order of saving
    found = [(step, child) for child in saved if (step := manifest.step_of(child)) is not None]
    return sorted(found, key=lambda pair: pair[0])


def latest(run: Location) -> tuple[int, Location] | None:
    """The newest checkpoint in which every byte is right; each one that is passed over is warned about."""
    whole = complete(run)
    for child in (run / CHECKPOINTS).folders():
        if child not in [folder for _, folder in whole]:
            _warn(child, manifest.verify(child))
    for step, folder in reversed(whole):
        problems = manifest.verify(folder)
        if not problems:
            return step, folder
        _warn(folder, problems)
    return None


def _warn(folder: Location, problems: list[str]) -> None:
    logger.warning("checkpoint %s is damaged and left out: %s", folder, "; ".join(problems[:3]))
