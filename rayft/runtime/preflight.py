"""Before the start: does the cluster have what the recipe asks for? Answered within seconds, never by waiting."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.runtime.cluster import Cluster, Node, describe, snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where the workers go. ``resources`` are those of one worker, CPU and GPU included."""

    workers: tuple[int, int]
    """(min, max); equal unless `scale.workers` is elastic."""
    use_gpu: bool
    cpus_per_worker: int
    resources: dict[str, float]


def check(recipe: Recipe) -> Placement:
    """Fit the recipe's workers into the connected cluster.

    Raises UsageError: R503 not enough room for the workers, R504 `device: gpu` without a GPU, R505 no node is large
    enough for one worker, R507 FSDP without an accelerator, R508 a node does not see `storage`.
    """
    cluster = snapshot()
    placement = place(recipe, cluster)
    _wait_until_free(placement, recipe)
    if "://" not in recipe.storage:
        _check_storage(recipe.storage, cluster)
    return placement


def place(recipe: Recipe, cluster: Cluster) -> Placement:
    """The placement in a given cluster; the pure part of `check`, with the same errors except R508."""
    gpus = max(cluster.total("GPU"), (cluster.limit or {}).get("GPU", 0))
    device = recipe.scale.device
    if device == "gpu" and not gpus:
        raise UsageError(
            "R504", f"scale.device is gpu, and the cluster has no GPU: {_nodes(cluster)}", "scale.device=cpu"
        )
    use_gpu = device == "gpu" or (device == "auto" and gpus > 0)
    if recipe.scale.strategy == "fsdp" and not use_gpu:
        raise UsageError(
            "R507",
            "scale.strategy fsdp needs accelerators, and the workers would run on CPUs",
            "scale.strategy=ddp or zero3",
        )
    cpus = recipe.scale.cpus_per_worker or _default_cpus(cluster, use_gpu)
    worker: dict[str, float] = {"CPU": cpus, **({"GPU": 1} if use_gpu else {}), **recipe.scale.resources_per_worker}
    return Placement(_workers(recipe, cluster, worker), use_gpu, cpus, worker)


def _workers(recipe: Recipe, cluster: Cluster, worker: dict[str, float]) -> tuple[int, int]:
    room, possible = cluster.room(worker), cluster.room_with_autoscaler(worker)
    if possible == 0:
        raise UsageError(
            "R505",
            f"one worker needs {describe(worker)}, and no node has that: {_nodes(cluster)}",
            "lower scale.cpus_per_worker or scale.resources_per_worker, or add a larger node",
        )
    asked = recipe.scale.workers
    if asked == "auto":
        return max(room, 1), max(room, 1)
    low, high = asked if isinstance(asked, tuple) else (asked, asked)
    if low > possible:
        missing = {name: round(amount * (low - possible), 6) for name, amount in worker.items()}
        raise UsageError(
            "R503",
            f"scale.workers asks for {low} workers of {describe(worker)}; the cluster has room for {possible}: "
            f"{_nodes(cluster)}. Missing: {describe(missing)}",
            f"scale.workers={possible} (or auto), or add nodes",
        )
    if low > room:
        logger.warning("room for %d of %d workers now: the autoscaler is asked for the rest", room, low)
    return low, high


def _default_cpus(cluster: Cluster, use_gpu: bool) -> int:
    """One core per worker; on GPU nodes the node's cores over its GPUs, where that is least."""
    shares = [node.total.get("CPU", 0) // node.total["GPU"] for node in cluster.nodes if node.total.get("GPU")]
    return max(1, int(min(shares))) if use_gpu and shares else 1


def _wait_until_free(placement: Placement, recipe: Recipe, patience: float = 5) -> None:
    """Resources of a run that has just ended come back a moment later; what is still taken then is said aloud."""
    end = time.monotonic() + patience
    while True:
        cluster = snapshot()
        free = cluster.free_room(placement.resources)
        if free >= min(placement.workers[0], cluster.room(placement.resources)):
            return
        if time.monotonic() > end:
            logger.warning(
                "the cluster is busy: free room for %d of %d workers; %r begins when others have ended",
                free,
                placement.workers[0],
                recipe.name,
            )
            return
        time.sleep(0.2)


def _check_storage(storage: str, cluster: Cluster) -> None:
    """Raises UsageError R508 when another host does not see a file that this process puts into the storage."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    mine = next((node.host for node in cluster.nodes if node.id == here), None)
    others = {node.host: node for node in cluster.nodes if node.host != mine}
    blind = nodes_that_miss(storage, list(others.values()))
    if blind:
        raise UsageError(
            "R508",
            f"storage {storage!r} is not shared: {', '.join(node.host for node in blind)} cannot see it",
            "use a folder on a shared file system that all nodes mount, or a bucket: storage=s3://bucket/runs",
        )


def nodes_that_miss(storage: str, nodes: Sequence[Node], timeout: float = 20) -> list[Node]:
    """The nodes that do not see a fresh file in ``storage``. One too busy to answer in time is not counted."""
    if not nodes:
        return []
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    Path(storage).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=storage, prefix=".seen-") as probe:
        sees = ray.remote(num_cpus=0, max_retries=0)(exists_there)
        answers = {
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                probe.name
            ): node
            for node in nodes
        }
        ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=timeout)
        return [answers[answer] for answer in ready if not ray.get(answer)]


def exists_there(path: str) -> bool:
    """Runs on the other node."""
    return os.path.exists(path)


def _nodes(cluster: Cluster) -> str:
    """``2 nodes: a (4 CPU), b (4 CPU)``, shortened for a large cluster."""
    shown = [str(node) for node in cluster.nodes[:4]]
    rest = len(cluster.nodes) - len(shown)
    count = f"{len(cluster.nodes)} node{'s' if len(cluster.nodes) != 1 else ''}"
    return f"{count}: {', '.join(shown)}{f' and {rest} more' if rest > 0 else ''}"
