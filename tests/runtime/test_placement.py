"""Preflight's arithmetic, without Ray: what fits, and what the message says when it does not."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.runtime.cluster import Cluster, Node
from rayft.runtime.preflight import Placement, place


def cluster(*nodes: dict[str, float], limit: dict[str, float] | None = None) -> Cluster:
    made = [Node(f"id{index}", f"host{index}", total, total) for index, total in enumerate(nodes)]
    return Cluster(tuple(made), limit)


def recipe(**scale: Any) -> Recipe:
    return Recipe.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl"}, "scale": scale})


CPU2 = {"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0}
GPU4 = {"CPU": 32.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("scale", "nodes", "expected"),
    [
        ({}, [CPU2], Placement((2, 2), False, 1, {"CPU": 1})),
        ({"workers": "auto", "cpus_per_worker": 2}, [CPU2, {"CPU": 5.0}], Placement((3, 3), False, 2, {"CPU": 2})),
        ({"workers": 3}, [CPU2, CPU2], Placement((3, 3), False, 1, {"CPU": 1})),
        ({"workers": [2, 6]}, [CPU2, CPU2], Placement((2, 6), False, 1, {"CPU": 1})),
        ({}, [CPU2, GPU4], Placement((4, 4), True, 8, {"CPU": 8, "GPU": 1})),
        ({"device": "cpu"}, [CPU2, GPU4], Placement((34, 34), False, 1, {"CPU": 1})),
        ({"workers": 2, "strategy": "fsdp"}, [GPU4], Placement((2, 2), True, 8, {"CPU": 8, "GPU": 1})),
        (
            {"resources_per_worker": {"big": 0.1}},
            [{"CPU": 4.0, "big": 0.3}],
            Placement((3, 3), False, 1, {"CPU": 1, "big": 0.1}),
        ),
    ],
)
def test_placement(scale: dict[str, Any], nodes: list[dict[str, float]], expected: Placement) -> None:
    assert place(recipe(**scale), cluster(*nodes)) == expected


def test_more_workers_than_the_cluster_has() -> None:
    with pytest.raises(UsageError, match="R503") as caught:
        place(recipe(workers=8), cluster(CPU2, CPU2))
    message = caught.value.message
    assert "8 workers of 1 CPU" in message and "room for 4" in message
    assert "2 nodes: host0 (2 CPU), host1 (2 CPU)" in message and "Missing: 4 CPU" in message
    assert "scale.workers=4" in (caught.value.hint or "") and caught.value.exit_code == 2


def test_a_worker_does_not_span_nodes() -> None:
    with pytest.raises(UsageError, match=r"R505.*one worker needs 3 CPU"):
        place(recipe(workers=1, cpus_per_worker=3), cluster(CPU2, CPU2))


def test_missing_custom_resource_and_gpu() -> None:
    with pytest.raises(UsageError, match=r"R505.*0.001 accelerator_type:A100"):
        place(recipe(resources_per_worker={"accelerator_type:A100": 0.001}), cluster(CPU2))
    with pytest.raises(UsageError, match=r"R504.*no GPU: 1 node: host0 \(2 CPU\)"):
        place(recipe(device="gpu"), cluster(CPU2))
    with pytest.raises(UsageError, match="R507"):
        place(recipe(strategy="fsdp"), cluster(CPU2))


def test_elastic_needs_the_minimum_only() -> None:
    assert place(recipe(workers=[1, 64]), cluster(CPU2)).workers == (1, 64)
    with pytest.raises(UsageError, match="R503"):
        place(recipe(workers=[3, 64]), cluster(CPU2))


def test_an_autoscaler_may_bring_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    """No silent wait: the log says that nodes are asked for; beyond the autoscaler's limit it is an error at once."""
    scalable = cluster({"CPU": 2.0}, limit={"CPU": 66.0, "GPU": 8.0})
    assert place(recipe(workers=8, device="gpu", cpus_per_worker=8), scalable).workers == (8, 8)
    assert "the autoscaler is asked for the rest" in caplog.text
    with pytest.raises(UsageError, match="R503"):
        place(recipe(workers=9, device="gpu", cpus_per_worker=1), scalable)


def test_a_large_cluster_is_not_listed_in_full() -> None:
    with pytest.raises(UsageError, match=r"100 nodes: host0 .* and 96 more"):
        place(recipe(workers=999), cluster(*[CPU2] * 100))
