"""Partitioners: every example once, the shape that was asked for, and a reason where it cannot be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayft.config.federate import Partition
from rayft.errors import UsageError
from rayft.federate.heterogeneity import measure
from rayft.federate.partition import split

LABELS = [f"c{value}" for value in np.random.default_rng(1).integers(0, 6, 300)]


def made(clients: int = 10, seed: int = 3, labels: list[str] = LABELS, **partition: Any) -> dict[str, np.ndarray]:
    return split(Partition(**partition), labels, clients, seed)


@pytest.mark.parametrize("method", ["iid", "dirichlet", "pathological", "quantity", "natural"])
def test_every_example_belongs_to_one_client(method: str) -> None:
    parts = made(method=method, column="task")
    assert sorted(index for part in parts.values() for index in part.tolist()) == list(range(300))
    assert all(np.array_equal(a, b) for a, b in zip(parts.values(), made(method=method).values(), strict=True))
    if method != "natural":
        assert list(parts) == [str(number) for number in range(10)]
        other = made(method=method, seed=4)
        assert any(not np.array_equal(a, b) for a, b in zip(parts.values(), other.values(), strict=True))


def test_iid_parts_are_of_equal_size() -> None:
    assert {len(part) for part in made(clients=7, method="iid").values()} == {42, 43}


def test_pathological_clients_have_so_many_classes() -> None:
    found = measure(made(method="pathological", classes=2), LABELS)
    assert set((found.counts > 0).sum(axis=1)) == {2}
    owners = (found.counts > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1


def test_quantities_differ_and_keep_their_least() -> None:
    sizes = [len(part) for part in made(method="quantity", alpha=0.3, min_size=5).values()]
    assert min(sizes) >= 5 and max(sizes) > 3 * min(sizes)


def test_natural_clients_are_the_values_in_order() -> None:
    assert list(made(method="natural")) == [f"c{number}" for number in range(6)]
    assert list(made(method="natural", labels=["10", "9", "10"])) == ["9", "10"]


def test_small_alphas_make_clients_differ_more() -> None:
    near = measure(made(method="dirichlet", alpha=100.0), LABELS).summary()
    far = measure(made(method="dirichlet", alpha=0.1, min_size=1), LABELS).summary()
    assert far["mean_distance"] > 3 * near["mean_distance"]
    assert far["mean_effective_classes"] < near["mean_effective_classes"] <= 6


def test_the_report_counts_by_hand() -> None:
    found = measure({"a": [0, 1], "b": [2, 3]}, ["x", "x", "x", "y"])
    assert found.counts.tolist() == [[2, 0], [1, 1]]
    assert found.distances.tolist() == [0.25, 0.25]
    assert found.effective_classes.tolist() == pytest.approx([1.0, 2.0])
    assert found.summary()["size_ratio"] == 1.0


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"clients": 301, "method": "iid"}, "300 examples cannot be split over 301"),
    ({"method": "dirichlet", "alpha": 0.01, "min_size": 20}, "draws of Dirichlet"),
    ({"method": "pathological", "classes": 7}, "the column has 6"),
    ({"clients": 2, "method": "pathological", "classes": 2}, "2 classes to nobody"),
    ({"method": "quantity", "min_size": 31}, "need 310"),
    ({"method": "natural", "labels": ["a", "a", "b"], "min_size": 2}, "client b has 1"),
    ({"clients": 100, "method": "iid", "min_size": 4}, "client 0 has 3"),
]


@pytest.mark.parametrize(("settings", "reason"), IMPOSSIBLE, ids=lambda item: str(item)[:50])
def test_what_cannot_be_met_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        made(**settings)
    assert caught.value.id == "R901"
