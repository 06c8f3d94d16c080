"""What a Ray cluster has: its nodes with their resources, and what an autoscaler may add."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Resources = Mapping[str, float]
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Node:
    """One living node. ``free`` is what nobody has reserved at the moment."""

    id: str
    host: str
    total: Resources
    free: Resources
    labels: Mapping[str, str] = field(default_factory=dict)

    def has(self, selector: Mapping[str, str]) -> bool:
        """Whether its labels are those that a label selector of Ray asks for: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
        return all(_selects(text, self.labels.get(name)) for name, text in selector.items())

    def room(self, worker: Resources) -> int:
        """Workers that fit when nothing else runs."""
        return _room(self.total, worker)

    def free_room(self, worker: Resources) -> int:
        return _room(self.free, worker)

    def __str__(self) -> str:
        return f"{self.host} ({describe(self.total)})"


@dataclass(frozen=True)
class Cluster:
    """A snapshot. ``limit`` is what the autoscaler's configuration allows in all, None without one."""

    nodes: tuple[Node, ...]
    limit: Resources | None = None

    def total(self, resource: str) -> float:
        return sum(node.total.get(resource, 0) for node in self.nodes)

    def room(self, worker: Resources) -> int:
        """Workers that fit on the nodes there are, each on one node."""
        return sum(node.room(worker) for node in self.nodes)

    def free_room(self, worker: Resources) -> int:
        return sum(node.free_room(worker) for node in self.nodes)

    def room_with_autoscaler(self, worker: Resources) -> int:
        return max(self.room(worker), _room(self.limit, worker) if self.limit else 0)


def snapshot() -> Cluster:
    """The cluster this process is connected to."""
    import ray
    from ray._private.state import available_resources_per_node, state  # Ray has no public call for either

    free = available_resources_per_node()
    nodes = [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["Resources"],
            free.get(node["NodeID"], {}),
            node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return Cluster(tuple(nodes), state.get_max_resources_from_cluster_config())


def describe(resources: Resources) -> str:
    """``4 CPU, 1 GPU``: what a recipe can ask for, without Ray's own entries."""
    shown = {
        name: amount for name, amount in resources.items() if not name.startswith(("node:", "memory", "object_store"))
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "no CPU"


def _selects(text: str, label: str | None) -> bool:
    """Whether one condition of a label selector holds; a node without the label has none of the values."""
    wanted = text.removeprefix("!")
    values = wanted[3:-1].replace(" ", "").split(",") if wanted.startswith("in(") else [wanted]
    return (label in values) != text.startswith("!")


def _room(has: Resources, worker: Resources) -> int:
    """How often ``worker`` fits into ``has``; amounts of zero ask for nothing."""
    ratios = [has.get(name, 0) / amount for name, amount in worker.items() if amount > 0]
    return math.floor(min(ratios) + _TOLERANCE) if ratios else 0
