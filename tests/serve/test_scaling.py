"""How many replicas there are, and which one takes a request."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.serve.router import SPREAD, Router
from rayft.serve.scaling import QUEUED_TOKENS, by_queued_tokens


def context(current: int, queued: dict[str, float], requests: float) -> Any:
    return SimpleNamespace(
        current_num_replicas=current, aggregated_metrics={QUEUED_TOKENS: queued}, total_num_requests=requests
    )


@pytest.mark.parametrize(
    ("current", "queued", "requests", "wanted"),
    [
        (1, {"a": 0}, 1, 1),
        (1, {"a": 1000}, 50, 1),  # waits, but not for long
        (1, {"a": 1001}, 50, 2),
        (2, {"a": 3000, "b": 600}, 50, 4),
        (3, {"a": 0, "b": 0, "c": 0}, 2, 2),  # nothing waits, and one has nothing to do
        (3, {"a": 0, "b": 0, "c": 0}, 3, 3),
        (0, {}, 0, 0),
    ],
)
def test_replicas_follow_the_tokens_that_wait(current: int, queued: Any, requests: float, wanted: int) -> None:
    assert by_queued_tokens(context(current, queued, requests), target=1000)[0] == wanted


def routed(replicas: dict[str, tuple[int, list[str]]], adapter: str) -> list[list[str]]:
    """replicas: name -> (requests, adapters). Names in the order in which they are asked."""
    router = Router.__new__(Router)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda name: replicas[name][0])  # type: ignore[assignment]
    candidates: Any = [
        SimpleNamespace(replica_id=name, routing_stats={"adapters": adapters})
        for name, (_, adapters) in replicas.items()
    ]
    pending: Any = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=adapter))
    groups = asyncio.run(router.choose_replicas(candidates, pending))
    return [[replica.replica_id for replica in group] for group in groups]


def test_requests_go_where_their_adapter_is() -> None:
    random.seed(0)
    replicas = {"a": (3, ["x"]), "b": (1, ["y"]), "c": (0, []), "d": (5, ["x", "y"])}
    first, rest = routed(replicas, "x")
    assert first == ["a", "d"] and len(rest) == 2
    (others,) = routed(replicas, "z")
    assert len(set(others)) == 2
    assert {name for _ in range(50) for name in routed(replicas, "z")[0]} == set(replicas)


def test_an_adapter_that_is_asked_for_often_spreads() -> None:
    assert routed({"a": (SPREAD, ["x"]), "b": (0, [])}, "x")[0] == ["a"]
    (others,) = routed({"a": (SPREAD + 1, ["x"]), "b": (0, [])}, "x")
    assert set(others) == {"a", "b"}  # of which Ray Serve takes the one with the shorter queue


def test_there_is_not_always_a_choice() -> None:
    assert routed({"a": (99, [])}, "x") == [["a"]]
    assert routed({}, "x") == []
