"""What a lane's process does: load the base, open a pack, and train trials in it until the study has none left."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.runs.folder import RunFolder
from rayft.runs.storage import locate, write_atomic
from rayft.tune.capacity import Capacity
from rayft.tune.lane import Lane, Need
from rayft.tune.owner import Remote

STATE = "state.pt"
"""A trial's checkpoint, in its folder while it has not ended."""
SHARE = 0.8
"""Of the free memory that adapters may take; the rest is for the allocator's gaps."""


@dataclass(frozen=True)
class LaneJob:
    """Everything a lane needs, as plain data. Paths are absolute and readable on every node."""

    recipe: dict[str, Any]
    """The sweep's own, with its number format decided."""
    run: str
    base: str
    """Name or folder of the base model, as `models.hub.fetch` takes it."""
    device: str
    """cpu or gpu."""
    threads: int
    most: int
    """Adapters at once at most."""
    grow: bool
    """Begin with one adapter and measure whether more pay."""
    neighbours: int = 1
    """Lanes that share this machine's memory."""
    init_from: str | None = None


class RunFiles:
    """Checkpoints and adapters of trials in `<run>/trials/<number>`."""

    def __init__(self, run: str) -> None:
        self.run = run

    def save(self, number: int, state: dict[str, Any]) -> str:
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        place = locate(self.run) / "trials" / str(number) / STATE
        place.parent.make_folder()
        write_atomic(place, buffer.getvalue())
        return str(place)

    def load(self, path: str) -> dict[str, Any]:
        import torch

        state: dict[str, Any] = torch.load(io.BytesIO(locate(path).read()), weights_only=True)
        return state

    def forget(self, number: int) -> None:
        (locate(self.run) / "trials" / str(number) / STATE).remove()

    @contextmanager
    def adapter(self, number: int) -> Iterator[Path]:
        with RunFolder.open(self.run).writing(f"trials/{number}/adapter") as folder:
            yield folder


def ray_lane(config: dict[str, Any], job: LaneJob, study: Any) -> None:
    """A trial of Ray Tune that is a lane. Started again after a death, it gives back what its former self held."""
    owner = Remote(study)
    name = f"lane-{config['lane']}"
    owner.lost(name)
    os.environ.update(owner.environment())
    run_lane(job, name, owner)


def run_lane(job: LaneJob, name: str, study: Any) -> None:
    """Train trials of `study`, a `Study` or its `Remote`, until there are none left."""
    from rayft.train.worker import quiet

    quiet()
    import torch

    from rayft.data.prepare import prepare
    from rayft.multilora.pack import Pack
    from rayft.train.preparation import data_cache

    torch.set_num_threads(job.threads)
    recipe = Recipe.model_validate(job.recipe)
    pack = Pack.open(recipe, job.base, device=job.device)
    rendered: dict[str, Prepared] = {}

    def data_of(recipe: Recipe) -> Prepared:
        key = repr((recipe.data, recipe.train.objective, recipe.seed))
        if key not in rendered:
            rendered[key] = prepare(recipe, pack.tokenizer, data_cache(recipe))
        return rendered[key]

    lane = Lane(
        name,
        study,
        pack,
        RunFiles(job.run),
        Capacity(job.most, grow=job.grow),
        data_of=data_of,
        need_of=lambda recipe, data: need(recipe, data, job),
        memory=_free_memory(job) if job.grow else math.inf,
        init_from=job.init_from,
    )
    lane.run()
    if lane.seconds:
        study.measured(lane.tokens / lane.seconds, lane.capacity.rates.get(1))


def need(recipe: Recipe, data: Prepared, job: LaneJob) -> Need:
    """Memory of a trial by the one estimator that there is (`models.memory`)."""
    from rayft.data.micro_batches import micro_batch_size
    from rayft.data.schedule import StepSchedule
    from rayft.models import hub, memory

    examples = data.split("train")
    assert examples is not None
    schedule = StepSchedule.of(recipe, examples)
    micro = micro_batch_size(recipe.train.micro_batch_size, schedule, 1, job.device)
    found = memory.estimate(
        recipe,
        hub.fetch(job.base, recipe.model.revision),
        micro_batch_size=micro,
        tokens=micro * int(schedule.lengths.max()),
        device=job.device,
    )
    own = 4 * found.trainable_parameters + found.gradients + found.optimizer + found.activations
    return Need(alone=found.total, added=own)


def _free_memory(job: LaneJob) -> float:
    """Bytes for adapters, with the base loaded."""
    if job.device == "gpu":
        import torch

        return SHARE * torch.cuda.mem_get_info()[0]
    import psutil

    return SHARE * psutil.virtual_memory().available / job.neighbours
