"""Where a worker runs: inside Ray Train, or alone in this process (`scale.workers: 0`)."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayft.runs.storage import Location, locate
from rayft.train.recorder import Recorder


class Recording(Protocol):
    """The run's recorder as a worker sees it: an actor, or an object of this process."""

    def tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call without waiting for an answer."""
        ...

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call and wait for the answer."""
        ...


@dataclass(frozen=True)
class LocalRecording:
    recorder: Recorder

    def tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        self.ask(method, *args, **kwargs)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.recorder, method)(*args, **kwargs)


@dataclass(frozen=True)
class ActorRecording:
    actor: Any

    def tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        getattr(self.actor, method).remote(*args, **kwargs)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        import ray

        return ray.get(getattr(self.actor, method).remote(*args, **kwargs))


class Context(Protocol):
    """One worker's place in the run."""

    rank: int
    workers: int
    local_rank: int
    node: str
    recording: Recording

    def checkpoint(self) -> str | None:
        """Name of the latest checkpoint that the cluster knows for this run, or None."""
        ...

    def report(self, metrics: dict[str, Any], folder: str | None, name: str | None, last: bool) -> None:
        """Report scalars, and the files of this worker in `folder` as part of checkpoint `name`. A barrier.

        The folder is gone afterwards. `last`: wait until the checkpoint is in storage."""
        ...

    def preempted(self) -> bool:
        """Whether the cloud has announced to take a node of this run. A barrier."""
        ...


@dataclass
class LocalContext:
    """One worker without Ray. Checkpoints are moved into `folder`."""

    folder: Location
    recording: Recording
    on_checkpoint: Any
    rank: int = 0
    workers: int = 1
    local_rank: int = 0
    node: str = "local"

    def checkpoint(self) -> str | None:
        return None

    def report(self, metrics: dict[str, Any], folder: str | None, name: str | None, last: bool) -> None:
        if folder is None or name is None:
            return
        target = self.folder / name
        if target.is_local:
            os.makedirs(self.folder.local, exist_ok=True)
            shutil.move(folder, target.local)
        else:
            locate(folder).move_to(target)
        self.on_checkpoint(metrics, target)

    def preempted(self) -> bool:
        return False


@dataclass
class RayContext:
    """A worker of Ray Train."""

    recording: Recording
    rank: int = field(init=False)
    workers: int = field(init=False)
    local_rank: int = field(init=False)
    node: str = field(init=False)

    def __post_init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.local_rank, self.node = context.get_local_rank(), ray.get_runtime_context().get_node_id()

    def checkpoint(self) -> str | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else checkpoint.path.rstrip("/").rsplit("/", 1)[-1]

    def report(self, metrics: dict[str, Any], folder: str | None, name: str | None, last: bool) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        # Uploads of ASYNC reports keep their order and are flushed before the train function returns; the last one
        # waits, because the job may be ended right after it.
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder) if folder else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def preempted(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None
