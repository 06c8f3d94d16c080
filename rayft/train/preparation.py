"""Everything that is settled before the first worker starts: cluster, base model, data, number format, schedule."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rayft.config import compatibility
from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.data.micro_batches import micro_batch_size
from rayft.data.prepared import STATS
from rayft.data.schedule import StepSchedule
from rayft.functions import load_function
from rayft.home import home
from rayft.metrics import registry
from rayft.runs import reference
from rayft.runs.folder import CHECKPOINTS, RunFolder
from rayft.runs.storage import is_committed, local_copy, locate, staged
from rayft.train.worker import Job


@dataclass(frozen=True)
class Settled:
    """What the first task on a worker's kind of node finds out. Plain data."""

    base_hash: str
    template_hash: str
    dtype: str
    data_folder: str
    data_hash: str


@dataclass(frozen=True)
class Preparation:
    """The plan of a run. `recipe.model.dtype` is decided; `placement` None = one worker in this process."""

    recipe: Recipe
    placement: Any
    device: str
    """cpu or gpu."""
    base: str
    init_adapter: str | None
    settled: Settled
    workers: int = 1
    """The most workers there can be."""

    @cached_property
    def data(self) -> Prepared:
        return data_here(self.settled.data_folder, self.settled.data_hash)

    @cached_property
    def schedule(self) -> StepSchedule:
        examples = self.data.split("train")
        assert examples is not None
        return StepSchedule.of(self.recipe, examples)

    def micro_batch_size(self) -> int:
        """Examples per forward pass that the run starts with."""
        return micro_batch_size(self.recipe.train.micro_batch_size, self.schedule, self.workers, self.device)

    def job(self, folder: RunFolder, answer: str | None) -> Job:
        """The first attempt, or the next one of a run that was interrupted."""
        carried = folder.record.facts.get("attempt")
        former = carried or {"micro_batch_size": self.micro_batch_size(), "diverged": None, "learning_rate_scale": 1.0}
        return Job(
            recipe=self.recipe.model_dump(mode="json"),
            base=self.base,
            data_folder=self.settled.data_folder,
            data_hash=self.settled.data_hash,
            checkpoints=str(folder.location / CHECKPOINTS),
            device=self.device,
            threads=self.placement.cpus_per_worker if self.placement is not None else max(1, (os.cpu_count() or 2) - 1),
            micro_batch_size=former["micro_batch_size"],
            attempt=carried["attempt"] + 1 if carried else 0,
            reason="resumed" if carried else "",
            diverged=tuple(former["diverged"]) if former["diverged"] else None,
            learning_rate_scale=former["learning_rate_scale"],
            init_adapter=self.init_adapter,
            answer=answer,
        )


def prepare(recipe: Recipe) -> Preparation:
    """Find the cluster and its room, fetch the base, render the data. Raises UsageError for what the user can fix."""
    base, init_adapter = base_of(recipe)
    placement = None
    if recipe.scale.workers != 0:
        from rayft.runtime import preflight, session

        session.connect(recipe)
        placement = preflight.check(recipe)
    device: Literal["cpu", "gpu"]
    device = device_here(recipe) if placement is None else "gpu" if placement.use_gpu else "cpu"
    compatibility.check(recipe, device)
    for name in recipe.evaluate.metrics:
        registry.named(name)
    if recipe.train.loss_function:  # looked up before anything starts; each worker loads it again
        load_function(recipe.train.loss_function, "train.loss_function", "R614")
    settled = elsewhere(placement, settle, recipe.model_dump(mode="json"), base, device)
    decided = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": settled.dtype})})
    workers = placement.workers[1] if placement is not None else 1
    return Preparation(decided, placement, device, base, init_adapter, settled, workers)


def base_of(recipe: Recipe) -> tuple[str, str | None]:
    """(base model, adapter to continue), with references to runs resolved to folders or URIs of a bucket."""
    base, init = recipe.model.base, recipe.adapter.init_from if recipe.adapter else None
    if base.startswith("run:"):
        base = reference.resolve(base, recipe.storage).path
    return base, reference.resolve(init, recipe.storage).path if init else None


def settle(recipe_data: dict[str, Any], base: str, device: str, shared: bool = True) -> Settled:
    """On a node like a worker's: fetch the base, render the data (`shared`: so that all nodes find it), decide the
    number format."""
    from rayft.data.prepare import prepare as prepare_data
    from rayft.models import hub, identity, load
    from rayft.train.strategy import check_trainer_args
    from rayft.train.worker import quiet

    quiet()
    recipe = Recipe.model_validate(recipe_data)
    check_trainer_args(recipe)
    folder = hub.fetch(base, recipe.model.revision)
    tokenizer = load.load_tokenizer(recipe, folder)
    # Without sources the data is somewhere else: clients of a federation read their own.
    data = prepare_data(recipe, tokenizer, data_cache(recipe)) if recipe.data.train else Prepared("", "")
    return Settled(
        base_hash=identity.base_hash(folder),
        template_hash=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        dtype=load.dtype_of(recipe, device),
        data_folder=_shared_data(data, recipe) if shared and data.folder else data.folder,
        data_hash=data.hash,
    )


def device_here(recipe: Recipe) -> Literal["cpu", "gpu"]:
    """Where a run without Ray computes."""
    if recipe.scale.device != "auto":
        return recipe.scale.device
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def data_cache(recipe: Recipe) -> str:
    """Where rendered data lies: beside the runs, so that all nodes see it; on each node where runs are in a bucket."""
    storage = locate(recipe.storage)
    if storage.is_local:
        return str(storage.local / ".cache" / "data")
    return str(home() / "data")


def data_here(folder: str, hash: str) -> Prepared:
    """Rendered data on this machine. Where runs lie in a bucket it was rendered on one node: the others take a copy."""
    place, here = locate(folder), home() / "data" / hash
    if not place.is_local:
        folder = str(here) if (here / STATS).exists() else local_copy(place, here)
    return Prepared(folder, hash)


def _shared_data(data: Prepared, recipe: Recipe) -> str:
    """Where all nodes find rendered data: the folder itself, or its copy in the bucket of the runs."""
    storage = locate(recipe.storage)
    if storage.is_local:
        return data.folder
    place = storage / ".cache" / "data" / data.hash
    if not is_committed(place):
        with staged(place) as folder:
            shutil.copytree(data.folder, folder, dirs_exist_ok=True)
    return str(place)


def elsewhere(placement: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a Ray task with a worker's resources, or here without a cluster. Errors come as they were raised."""
    if placement is None:
        return work(*arguments)
    import ray

    resources = dict(placement.resources)
    task = ray.remote(work).options(
        num_cpus=resources.pop("CPU", 1),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
        max_retries=1,
        scheduling_strategy="DEFAULT",  # a trial of a sweep calls this inside a placement group that has no room for it
    )
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
