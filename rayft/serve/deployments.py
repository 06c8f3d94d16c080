"""The two deployments of a server on Ray Serve: engines, each with the base model, and the HTTP side without one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve

from rayft.errors import RayftError
from rayft.serve.backend import ModelCard, ReplicaState
from rayft.serve.job import Content, Job, Piece
from rayft.serve.plan import Plan
from rayft.serve.scaling import QUEUED_TOKENS, by_queued_tokens

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rayft.serve.replica import Replica
    from rayft.serve.vllm_loading import VllmReplica

log = logging.getLogger("rayft.serve")

ROUTER = "rayft.serve.router:Router"
MOST_JOBS = 10_000
"""Per replica, for Ray Serve; how many may wait is the engine's to say, in tokens."""


class Engines:
    """One replica with its engine."""

    async def __init__(self, plan: Plan, device: str, threads: int | None) -> None:  # type: ignore[misc]  # Ray's
        """threads: computing threads; None leaves them as they are. What the registry pins is loaded before the first
        request."""
        import torch

        from rayft.runs.registry import Registry
        from rayft.serve.lifecycle import pinned_contents

        id = serve.get_replica_context().replica_id.unique_id
        self.replica: Replica | VllmReplica
        if plan.recipe.serve.backend == "vllm":
            from rayft.serve.vllm_loading import vllm_replica

            self.replica = await vllm_replica(plan, device, threads, id)
        else:
            from rayft.serve.loading import replica

            if threads is not None:
                torch.set_num_threads(threads)
            self.replica = replica(plan, device, id)
        for alias in Registry(plan.registry).aliases().values():
            for content in pinned_contents(alias).values():
                try:
                    await self.replica.load(content, True)
                except RayftError as error:  # of another base, or no slot is free: that must not end the server
                    log.warning("%s is not pinned: %s", alias.name, error)

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        pieces = self.replica.generate(job)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    async def card(self) -> ModelCard:
        return await self.replica.card()

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        await self.replica.load(content, pinned)

    async def unload(self, hash: str) -> None:
        await self.replica.unload(hash)

    async def states(self) -> list[ReplicaState]:
        return await self.replica.states()

    def check_health(self) -> None:  # Ray Serve's name, and so are the next ones
        self.replica.check()

    def __del__(self) -> None:
        replica = getattr(self, "replica", None)
        if (process := getattr(replica, "process", None)) is not None:
            process.close()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {QUEUED_TOKENS: float(self.replica.queued_tokens)}

    def record_routing_stats(self) -> dict[str, Any]:
        return {"adapters": sorted(self.replica.loaded)}


class Api:
    """The HTTP side: routes, names, limits. One process, so that limits are exact."""

    def __init__(self, plan: Plan, engines: Any) -> None:
        """engines: None where a vLLM that runs already answers."""
        self.plan, self.engines = plan, engines

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray Serve's name
        from rayft.serve.assemble import assemble

        if self.plan.attach is not None:
            from rayft.serve.vllm_loading import attached

            return assemble(self.plan, attached(self.plan, self.plan.attach))
        from rayft.serve.ray_backend import RayBackend

        return assemble(self.plan, RayBackend(self.engines))


def application(plan: Plan, device: str, threads: int | None, resources: dict[str, float]) -> Any:
    """What `serve.run` takes. resources: of one engine, with Ray's names."""
    api = serve.deployment(
        serve.ingress()(Api), name="api", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MOST_JOBS
    )
    if plan.attach is not None:
        return api.bind(plan, None)
    low, high = plan.recipe.serve.replicas if isinstance(plan.recipe.serve.replicas, tuple) else (0, 0)
    scaling = {
        "min_replicas": low,
        "max_replicas": high,
        "policy": {
            "policy_function": by_queued_tokens,
            "policy_kwargs": {"target": plan.recipe.serve.target_queued_tokens},
        },
    }
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    engines = serve.deployment(
        Engines,
        name="engines",
        num_replicas=None if high else plan.recipe.serve.replicas,
        autoscaling_config=scaling if high else None,
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": gpus,
            "resources": {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")},
        },
        max_ongoing_requests=MOST_JOBS,
        request_router_config={"request_router_class": ROUTER},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=30,
    )
    return api.bind(plan, engines.bind(plan, device, threads))
