"""Start one attempt of a run: on Ray Train's workers, or in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rayft.config.recipe import Recipe
from rayft.home import home
from rayft.runs.folder import CHECKPOINTS, RunFolder
from rayft.runs.metrics import Row
from rayft.runs.storage import Location, locate
from rayft.runtime import session
from rayft.train.context import ActorRecording, LocalContext, LocalRecording, Recording
from rayft.train.recorder import Recorder
from rayft.train.trackers import TENSORBOARD, Trackers
from rayft.train.worker import Job, ray_worker, run

RESIZE_SECONDS = 60.0
"""How often an elastic run looks whether the cluster has room for another number of workers."""


class RunRecorder(Recorder):
    """The recorder of a run folder, which passes every row on to the trackers that the recipe names."""

    def __init__(self, path: str, recipe: dict[str, Any]) -> None:
        run_folder = self._run_folder = RunFolder.open(path)
        super().__init__(run_folder.metrics_log(), run_folder.events_log())
        last = max((row["step"] for row in self.rows()), default=0)
        names = recipe["train"]["report_to"]
        self._trackers = Trackers(names, str(run_folder.scratch), run_folder.name, recipe, last)

    def log(self, row: Row) -> None:
        super().log(row)
        self._trackers.log(row)

    def flush(self) -> None:
        super().flush()
        board = locate(self._run_folder.scratch / TENSORBOARD)
        if not self._run_folder.location.is_local and board.is_folder():
            board.copy_to(self._run_folder.location / TENSORBOARD)

    def close(self) -> None:
        self._trackers.close()
        self.flush()


@dataclass(frozen=True)
class Died:
    """Workers ended without a word of their own: a kill, a lost node, a crash below Python."""

    detail: str

    @property
    def out_of_memory(self) -> bool:
        """Whether Ray's memory monitor or the kernel took a worker for want of memory."""
        return "OutOfMemoryError" in self.detail or "memory pressure" in self.detail


class LocalLauncher:
    """`scale.workers: 0`: one worker in this process, without Ray."""

    def __init__(self, run_folder: RunFolder, recipe: Recipe) -> None:
        self.run_folder = run_folder
        recorder = RunRecorder(run_folder.path, recipe.model_dump(mode="json"))
        self.recording: Recording = LocalRecording(recorder)
        self.kept = _Kept(recipe.train.save_total_limit, run_folder)

    def launch(self, job: Job) -> dict[str, Any] | Died:
        return run(job, LocalContext(self.run_folder.location / CHECKPOINTS, self.recording, self.kept.add))

    def close(self) -> None:
        self.recording.ask("close")


class _Kept:
    """The retention that Ray Train applies in a cluster: the `limit` highest scores, and the latest."""

    def __init__(self, limit: int | None, run_folder: RunFolder) -> None:
        self.limit, self.run_folder = limit, run_folder
        self.scores: dict[str, tuple[float, int]] = {}

    def add(self, metrics: dict[str, Any], folder: Location) -> None:
        self.scores[str(folder)] = (metrics["score"], metrics["step"])
        ranked = sorted(self.scores, key=self.scores.__getitem__)
        for worst in ranked[: -self.limit] if self.limit else []:
            if worst != str(folder):
                locate(worst).remove()
                del self.scores[worst]
        self.run_folder.index_checkpoints()


class RayLauncher:
    """Workers of Ray Train; the recorder is an actor on the driver's node, so it outlives every worker."""

    def __init__(self, run_folder: RunFolder, recipe: Recipe, placement: Any) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.run_folder, self.recipe, self.placement = run_folder, recipe, placement
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = (
            ray.remote(RunRecorder)
            .options(num_cpus=0, scheduling_strategy=here)
            .remote(run_folder.path, recipe.model_dump(mode="json"))
        )
        self.recording: Recording = ActorRecording(self.actor)

    def launch(self, job: Job) -> dict[str, Any] | Died:
        """Run one attempt. The worker tells the recorder why it failed; a worker that could not is `Died`."""
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        low, high = self.placement.workers
        location = self.run_folder.location
        trainer = TorchTrainer(
            ray_worker,
            train_loop_config={"job": asdict(job), "recorder": self.actor},
            scaling_config=ScalingConfig(
                num_workers=(low, high) if low != high else low,
                use_gpu=self.placement.use_gpu,
                resources_per_worker=self.placement.resources,
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                storage_path=location.path,
                storage_filesystem=None if location.is_local else location.filesystem,
                # Attempts are ours to count: only we know whether an error is worth another one.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=self.recipe.train.save_total_limit,
                    checkpoint_score_attribute="score",
                    checkpoint_score_order="max",
                ),
                callbacks=[index_callback(self.run_folder.path)],
                worker_runtime_env={"env_vars": worker_environment(self.recipe)},
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            return Died(str(error))
        facts = result.return_value
        return facts if isinstance(facts, dict) else Died("the workers returned nothing")

    def close(self) -> None:
        import ray

        self.recording.ask("close")
        ray.kill(self.actor)


def index_callback(path: str) -> Any:
    """A Ray Train callback, run in its controller: steps.json lists a checkpoint once it is in storage."""
    from ray.train import UserCallback

    class IndexCheckpoints(UserCallback):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            if checkpoint is not None:
                RunFolder.open(path).index_checkpoints()

    return IndexCheckpoints()


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """Variables of every worker: those the recipe names, by value from this process, and quiet libraries."""
    passed = {name: os.environ[name] for name in recipe.scale.env if name in os.environ}
    always = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    if recipe.scale.strategy.startswith("zero"):
        # A build that a killed process left behind locks the shared folder for good: use one of our own.
        always["TORCH_EXTENSIONS_DIR"] = str(home() / "ops")
    return always | session.inherited() | passed


Launcher = LocalLauncher | RayLauncher
Launch = Callable[[Job], dict[str, Any] | Died]
