"""What stays when a run has ended: `adapter/` or `model/`, and `report.md` with its picture."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from rayft.errors import RunFailed
from rayft.runs.folder import RunFolder
from rayft.runs.storage import Location, locate
from rayft.train.context import Recording

TRAINING_STATE = (
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "trainer_state",
    "training_args",
    "manifest-",
    "rayft.json",
    "weights.pt",
    "global_step",
    "latest",
    "zero_to_fp32",
)
"""First letters of what a checkpoint holds besides the stock adapter or model."""


def export(folder: RunFolder, step: int, dtype: str) -> Literal["adapter", "model"]:
    """Make `<run>/adapter` or `<run>/model` from the checkpoint of `step`.

    Weights that were trained in full are fp32 masters in a checkpoint; the model is saved in `dtype`, the number format
    it was trained in. Raises RunFailed R605 when the checkpoint is missing.
    """
    checkpoints = folder.checkpoints()
    if step not in checkpoints:
        raise RunFailed(
            "R605", f"run {folder.name!r} has no complete checkpoint of step {step}", "--resume saves it again"
        )
    source = locate(checkpoints[step])
    kind: Literal["adapter", "model"] = "adapter" if (source / "adapter_config.json").is_file() else "model"
    with folder.writing(kind) as target:
        for name in source.files():
            if not name.startswith(TRAINING_STATE):
                _copy(source / name, locate(target / name))
        if kind == "model" and dtype != "fp32":
            from rayft.models.save import cast_weights

            cast_weights(target, dtype)
    return kind


def _copy(source: Location, target: Location) -> None:
    import pyarrow.fs as fs

    target.local.parent.mkdir(parents=True, exist_ok=True)
    fs.copy_files(
        source.path, target.path, source_filesystem=source.filesystem, destination_filesystem=target.filesystem
    )


def chosen_step(facts: dict[str, Any], best: bool) -> int:
    """The step that becomes the result: the last one, or the best by validation loss where the recipe asks for it."""
    return int(facts["best_step"] if best and facts["best_step"] else facts["step"])


def report(folder: RunFolder, recording: Recording, stats: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write `report.md` with the loss curve from what the recorder holds, also of a run that failed."""
    from rayft.train.plots import plot_run
    from rayft.train.summary import write_report

    rows, events = recording.ask("rows"), recording.ask("events")
    known = {"name": folder.name, "path": folder.path, "hashes": folder.record.hashes} | facts
    picture = None
    if len(rows) > 1:
        picture = "loss.png"
        with tempfile.TemporaryDirectory() as scratch:
            drawn = Path(scratch, picture)
            plot_run(rows, events, drawn, title=folder.name)
            folder.write_file(picture, drawn.read_bytes())
    folder.write_file("report.md", write_report(folder.recipe(), known, rows, events, stats, picture))
