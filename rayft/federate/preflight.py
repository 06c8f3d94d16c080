"""Before round 1: does a block of clients fit into a worker's memory?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayft.config.federate import Federate
from rayft.errors import UsageError
from rayft.federate.check import trains_alone
from rayft.train.preparation import Preparation, data_here, elsewhere

if TYPE_CHECKING:
    from rayft.config.recipe import Recipe
    from rayft.data.examples import Examples


@dataclass(frozen=True)
class Room:
    """Bytes, on a node like a worker's."""

    free: float
    base: int
    """The base with one client on it."""
    client: int
    """What each further client of a block adds."""

    def clients(self) -> int:
        """Clients that fit at once."""
        return max(0, int((self.free - self.base) // max(1, self.client)) + 1) if self.free >= self.base else 0


def check(prepared: Preparation, federate: Federate, workers: int) -> None:
    """Raises UsageError R905 when the workers of one machine cannot hold their blocks."""
    settled = prepared.settled
    room: Room = elsewhere(
        prepared.placement,
        measure,
        prepared.recipe.model_dump(mode="json"),
        prepared.base,
        settled.data_folder,
        settled.data_hash,
        prepared.device,
        workers,
    )
    refuse(room, federate.pack_size, workers, prepared.device)


def refuse(room: Room, pack_size: int, workers: int, device: str) -> None:
    """The pure part of `check`."""
    need = room.base + (pack_size - 1) * room.client
    if need <= room.free:
        return
    most = room.clients()
    shared = f", shared by {workers} workers" if device == "cpu" and workers > 1 else ""
    raise UsageError(
        "R905",
        f"a block of {pack_size} clients needs about {need / 1e9:.1f} GB on a worker, and {room.free / 1e9:.1f} GB are "
        f"free there{shared}",
        f"federate.pack_size={most}" if most else "fewer scale.workers, model.quantization=nf4 or a smaller model",
    )


def measure(recipe_data: dict[str, Any], base: str, folder: str, hash: str, device: str, workers: int) -> Room:
    """On a node like a worker's. On CPUs all workers are taken to share one machine, as they do on the smallest
    cluster, where memory is shortest."""
    from rayft.config.recipe import Recipe

    examples = data_here(folder, hash).split("train")
    assert examples is not None
    return room_for(Recipe.model_validate(recipe_data), base, examples, device, workers)


def room_for(recipe: Recipe, base: str, examples: Examples, device: str, workers: int) -> Room:
    """On this machine, for clients with examples like these."""
    from rayft.data.micro_batches import micro_batch_size
    from rayft.data.schedule import StepSchedule
    from rayft.models import hub, memory

    schedule = StepSchedule.of(recipe, examples)
    micro = micro_batch_size(recipe.train.micro_batch_size, schedule, 1, device)
    found = memory.estimate(
        recipe,
        hub.fetch(base, recipe.model.revision),
        micro_batch_size=micro,
        tokens=micro * int(schedule.lengths.max()),
        device=device,
    )
    values = found.trainable_parameters
    if trains_alone(recipe):  # one at a time; beside it the server's tensors, fp64 sums, and the answers that wait
        return Room(_free(device, workers), found.total + 12 * values, 4 * values)
    client = 4 * values + found.gradients + found.optimizer + found.activations
    return Room(_free(device, workers), found.total, client)


def _free(device: str, workers: int) -> float:
    if device == "gpu":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available / workers)
