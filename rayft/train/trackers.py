"""TensorBoard, MLflow and Weights & Biases: fed by the recorder on the driver's side, so a step is there once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from rayft.errors import UsageError
from rayft.runs.metrics import Row

TENSORBOARD = "tensorboard"
"""The folder of its event files in a run."""


class Tracker(Protocol):
    """Takes the scalars of a step; `close` writes what is left."""

    def __init__(self, folder: str, name: str, recipe: dict[str, Any], from_step: int) -> None: ...

    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: str, name: str, recipe: dict[str, Any], from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps beyond the checkpoint that a resumed run starts from are hidden: they are logged again.
        self._writer = SummaryWriter(os.path.join(folder, TENSORBOARD), purge_step=from_step + 1 if from_step else None)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of the same name in the experiment and at the server that MLflow's own variables name."""

    def __init__(self, folder: str, name: str, recipe: dict[str, Any], from_step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_dict(recipe, "recipe.json")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._mlflow.log_metrics(scalars, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """A run of the same name; a resumed one continues it."""

    def __init__(self, folder: str, name: str, recipe: dict[str, Any], from_step: int) -> None:
        import wandb

        self._run = wandb.init(name=name, id=name, config=recipe, dir=folder, resume="allow")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Trackers:
    """All trackers of a run behind the two methods of a sink that concern them."""

    def __init__(
        self, names: Sequence[str], folder: str, run_name: str, recipe: dict[str, Any], from_step: int
    ) -> None:
        """Raises UsageError R613 for one that is not installed."""
        self._trackers: list[Tracker] = []
        for name in names:
            try:
                self._trackers.append(TRACKERS[name](folder, run_name, recipe, from_step))
            except ImportError as error:
                raise UsageError(
                    "R613", f"train.report_to: {name} is not installed ({error})", f"pip install {name}"
                ) from error

    def log(self, row: Row) -> None:
        scalars = {
            key: float(value)
            for key, value in row.items()
            if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in self._trackers:
            tracker.log(row["step"], scalars)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
