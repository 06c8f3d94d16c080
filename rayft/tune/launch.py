"""Start the lanes of a sweep: as trials of Ray Tune, or one of them in this process."""

from __future__ import annotations

import logging
import os
from typing import Any

from rayft.errors import RayftError, RunFailed
from rayft.runs.folder import RunFolder
from rayft.runs.storage import locate
from rayft.tune.classic import ClassicJob, ray_trial, run_next
from rayft.tune.owner import Remote, StudyActor
from rayft.tune.plan import Plan
from rayft.tune.study import Study
from rayft.tune.worker import LaneJob, ray_lane, run_lane

LANES = "lanes"
"""Folder of Ray Tune's own files about the lanes, in the run folder."""


def open_study(plan: Plan, folder: RunFolder, *, resume: bool) -> Any:
    """The study's owner: an actor on the driver's node, or an object of this process. Raises what `Study` raises."""
    options: dict[str, Any] = {
        "budget": plan.budget,
        "name": folder.name,
        "first": plan.first,
        "resume": resume,
        "log": str(locate(folder.path) / "metrics.jsonl"),
    }
    home = str(folder.scratch if plan.tune.study_storage else folder.location.local)
    if plan.prepared.placement is None:
        return Study(plan.resolved, home, **options)
    owner = _actor(plan, folder)
    owner.open(plan.resolved, home, options)
    return owner


def shared(plan: Plan, folder: RunFolder, study: Any) -> Any:
    """What stands in for a study, where lanes can ask it."""
    return study if plan.prepared.placement is None else _actor(plan, folder, study)


def _actor(plan: Plan, folder: RunFolder, study: Any = None) -> Remote:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from rayft.train.launch import worker_environment

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = "study" if study is None else "repeats"
    named = ray.remote(StudyActor).options(
        num_cpus=0, scheduling_strategy=here, name=f"rayft-{kind}-{folder.name}-{os.getpid()}"
    )
    return Remote(named.remote(worker_environment(plan.recipe), study))


def close_study(owner: Any) -> None:
    owner.close()
    if isinstance(owner, Remote):
        import ray

        ray.kill(owner.actor)


def run_lanes(plan: Plan, folder: RunFolder, owner: Any, trials: int) -> None:
    """Train until the study has nothing left, at most `trials` of them in classic mode.

    Raises RunFailed R741 when lanes have died too often and trials are left.
    """
    job = _job(plan, folder)
    if plan.prepared.placement is not None:
        _on_ray(plan, folder, owner, job, plan.lanes if isinstance(job, LaneJob) or job.interval else trials)
    elif isinstance(job, LaneJob):
        run_lane(job, "lane-0", owner)
    else:
        while run_next(job, "trial-0", owner):
            pass


def _job(plan: Plan, folder: RunFolder) -> LaneJob | ClassicJob:
    prepared, placement = plan.prepared, plan.prepared.placement
    cpus = placement.cpus_per_worker if placement is not None else max(1, (os.cpu_count() or 2) - 1)
    if plan.chosen.mode == "classic":
        generated = bool(plan.recipe.evaluate.metrics)
        return ClassicJob(folder.path, prepared.device, plan.workers, cpus, generated, plan.interval)
    return LaneJob(
        recipe=plan.space.recipe({}).model_dump(mode="json"),
        run=folder.path,
        base=prepared.base,
        device=prepared.device,
        threads=cpus,
        most=plan.most,
        grow=plan.tune.pack_size == "auto",
        neighbours=plan.lanes,
        init_from=prepared.init_adapter,
    )


def _on_ray(plan: Plan, folder: RunFolder, owner: Remote, job: LaneJob | ClassicJob, count: int) -> None:
    # Lanes have no results of their own to log or show, and their errors are ours to tell.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    from ray import tune
    from ray.tune.progress_reporter import TrialProgressCallback

    class Silent(TrialProgressCallback):
        """The stock one announces the end of each trial at every verbosity."""

        def _print(self, msg: str) -> None:
            pass

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    home = locate(folder.path) / LANES
    home.make_folder()
    work = ray_lane if isinstance(job, LaneJob) else ray_trial
    trainable = tune.with_parameters(work, job=job, study=owner.actor)
    tuner = tune.Tuner(
        tune.with_resources(trainable, plan.resources),
        param_space={"lane": tune.grid_search(list(range(count)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=plan.lanes),
        run_config=tune.RunConfig(
            name=f"session-{len(home.children())}",
            storage_path=str(home),
            verbose=0,
            callbacks=[Silent()],
            failure_config=tune.FailureConfig(max_failures=plan.recipe.scale.max_failures),
        ),
    )
    errors = tuner.fit().errors
    left = [row.number for row in owner.rows() if not row.ended]
    if errors and left and not owner.stopping():
        cause = getattr(errors[0], "cause", None)
        if isinstance(cause, RayftError):
            raise cause
        numbers = ", ".join(map(str, left))
        last_line = str(errors[0]).strip().splitlines()[-1]
        raise RunFailed(
            "R741",
            f"{len(errors)} of {count} lanes failed and trials {numbers} are not done: {last_line}",
            f"the traceback is in {home}/*/*/error.txt; mend it and go on with --resume",
        )


def trials_left(owner: Any) -> int:
    """Trials that have not ended, begun or not."""
    return int(owner.limit()) - sum(row.ended for row in owner.rows())
