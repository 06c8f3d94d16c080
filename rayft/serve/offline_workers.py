"""The workers of an offline run: one in this process, or actors on the cluster."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rayft.errors import RunFailed
from rayft.serve.offline_items import Item
from rayft.serve.offline_worker import Worker
from rayft.serve.plan import Plan

SHARD = 16
"""Items that go to a worker together. A kill loses at most `SHARD` x `IN_FLIGHT` answers of each worker."""
IN_FLIGHT = 6
"""Shards that a worker has at a time, so that its batch stays full while one of them ends."""
RESTARTS = 3
"""Deaths of one worker, after which the others go on without it."""

Line = dict[str, Any]
Answer = Callable[[Sequence[Item]], Awaitable[list[Line]]]


class Lost(Exception):
    """A worker died and does not come back."""


def compute(plan: Plan, items: Sequence[Item], take: Callable[[Sequence[Line]], object]) -> None:
    """Answer the items; ``take`` gets the lines of each shard when it has ended.

    Raises:
        UsageError: R3xx of the base, R5xx of the cluster. RunFailed: R874, all workers died.
    """
    shards = [items[at : at + SHARD] for at in range(0, len(items), SHARD)]
    if plan.recipe.scale.workers == 0:
        from rayft.train.preparation import device_here

        asyncio.run(_here(Worker(plan, device_here(plan.recipe), None), shards, take))
    else:
        _on_cluster(plan, shards, take)


async def _here(worker: Worker, shards: Sequence[Sequence[Item]], take: Callable[[Sequence[Line]], object]) -> None:
    try:
        await pump([worker.answer], shards, take)
    finally:
        await worker.close()


def _on_cluster(plan: Plan, shards: Sequence[Sequence[Item]], take: Callable[[Sequence[Line]], object]) -> None:
    from rayft.runtime import preflight, session

    session.connect(plan.recipe)
    import ray

    placement = preflight.check(plan.recipe)
    resources = dict(placement.resources)
    actor = ray.remote(Worker).options(
        num_cpus=resources.pop("CPU", 1),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    device, threads = ("gpu", None) if placement.use_gpu else ("cpu", placement.cpus_per_worker)
    actors = [actor.remote(plan, device, threads) for _ in range(min(placement.workers[1], len(shards)))]
    try:
        asyncio.run(pump([_remote(each) for each in actors], shards, take))
    finally:
        for each in actors:
            ray.kill(each)


def _remote(actor: Any) -> Answer:
    from ray.exceptions import RayActorError, RayTaskError

    async def answer(items: Sequence[Item]) -> list[Line]:
        try:
            lines: list[Line] = await actor.answer.remote(items)
        except RayActorError as error:
            raise Lost(str(error).strip().splitlines()[-1]) from error
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        return lines

    return answer


async def pump(
    workers: Sequence[Answer], shards: Sequence[Sequence[Item]], take: Callable[[Sequence[Line]], object]
) -> None:
    """Give shards to workers until all are answered; what a lost worker had goes to others.

    Raises:
        RunFailed: R874 when no worker is left.
    """
    waiting, alive = deque(shards), list(workers)
    reason = ""

    async def feed(worker: Answer) -> None:
        nonlocal reason
        while waiting and worker in alive:
            shard = waiting.popleft()
            try:
                take(await worker(shard))
            except Lost as error:
                reason = str(error)
                waiting.appendleft(shard)
                if worker in alive:
                    alive.remove(worker)

    while waiting:
        if not alive:
            raise RunFailed("R874", f"all workers died: {reason}", "the same command goes on with what is missing")
        await asyncio.gather(*(feed(worker) for worker in list(alive) for _ in range(IN_FLIGHT)))
