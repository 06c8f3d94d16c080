"""Which replica takes a request: one that has its adapter loaded, unless too many wait there."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

SPREAD = 8
"""A replica with that many more requests than the least busy one is passed over, whatever it has loaded: so an adapter
that is asked for often spreads."""


class Router(RequestRouter):
    """Replicas say what they have (`record_routing_stats` of `deployments.Engines`). An adapter that is loaded nowhere
    goes to the less busy of two replicas drawn at random, the power of two choices (Mitzenmacher 2001)."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas to ask, one after the other; within a group the one with the shortest queue takes it."""
        if len(candidate_replicas) < 2:
            return [candidate_replicas] if candidate_replicas else []
        adapter = pending_request.metadata.multiplexed_model_id if pending_request else ""
        known = {
            replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for replica in candidate_replicas
        }
        bound = min(known.values()) + SPREAD
        holders = [
            replica
            for replica in candidate_replicas
            if adapter and adapter in _loaded(replica) and known[replica.replica_id] <= bound
        ]
        others = random.sample(candidate_replicas, 2)
        return [holders, others] if holders else [others]


def _loaded(replica: Any) -> Any:
    return (replica.routing_stats or {}).get("adapters", ())
