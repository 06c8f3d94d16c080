"""How examples are split over clients. Pure functions of labels and a seed.

`dirichlet` gives the same indices as `flwr_datasets.partitioner.DirichletPartitioner` with the same seed and shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rayft.config.federate import Partition
from rayft.errors import UsageError

TRIES = 11
"""Dirichlet draws before the smallest client counts as too small, as in flwr-datasets: the first and ten more."""

Labels = Sequence[str] | np.ndarray


def split(partition: Partition, labels: Labels, clients: int, seed: int) -> dict[str, np.ndarray]:
    """Client name -> int64 indices of its examples, in the order of the clients' numbers.

    labels: one per example, the value of `partition.column`. clients: how many, except for natural and sources, where
    each value is one.

    Raises UsageError R901 when the settings cannot be met.
    """
    labels = np.asarray(labels)
    seed = seed if partition.seed is None else partition.seed
    method = partition.method
    if method in ("natural", "sources"):
        parts = {str(value): np.flatnonzero(labels == value) for value in natural_order(labels)}
        check_sizes(sizes_of(parts), partition)
        return parts
    if clients > len(labels):
        raise _impossible(f"{len(labels)} examples cannot be split over {clients} clients", "federate.clients")
    if method == "iid":
        lists = iid(len(labels), clients, seed)
    elif method == "dirichlet":
        lists = dirichlet(
            labels, clients, partition.alpha, seed, partition.min_size, self_balancing=partition.self_balancing
        )
    elif method == "pathological":
        lists = pathological(labels, clients, partition.classes, seed)
    else:
        lists = quantity(len(labels), clients, partition.alpha, seed, partition.min_size)
    parts = {str(number): np.asarray(indices, dtype=np.int64) for number, indices in enumerate(lists)}
    check_sizes(sizes_of(parts), partition)
    return parts


def natural_order(labels: Labels) -> list[str]:
    """The distinct values; numbers in the order of numbers, everything else in that of text."""
    values = sorted({str(label) for label in labels})
    return sorted(values, key=int) if all(value.isdecimal() for value in values) else values


def iid(count: int, clients: int, seed: int) -> list[list[int]]:
    """Random parts whose sizes differ by one at most."""
    order = np.random.default_rng([seed, 3]).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, clients)]


def dirichlet(
    labels: Labels, clients: int, alpha: float, seed: int, min_size: int = 10, *, self_balancing: bool = False
) -> list[list[int]]:
    """Of each class, in the order of classes, clients get shares drawn from Dirichlet(alpha) (arXiv 1909.06335).

    Raises UsageError R901 when the smallest client stays below ``min_size`` in all draws.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    average = len(labels) / clients
    smallest = 0
    for _ in range(TRIES):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for value in classes:
            shares = generator.dirichlet(np.full(clients, alpha))
            if self_balancing:
                shares = np.array([share * (len(part) <= average) for share, part in zip(shares, parts, strict=True)])
                shares = shares / shares.sum()
            members = np.flatnonzero(labels == value)
            cuts = (np.cumsum(shares) * len(members)).astype(int)[:-1]
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.extend(piece.tolist())
        smallest = min(map(len, parts))
        if smallest >= min_size:
            for part in parts:
                generator.shuffle(part)
            return parts
    raise _impossible(
        f"in {TRIES} draws of Dirichlet({alpha:g}) a client had {smallest} examples, and min_size is {min_size}",
        "a larger federate.partition.alpha, fewer federate.clients or a smaller min_size",
    )


def pathological(labels: Labels, clients: int, classes: int, seed: int) -> list[list[int]]:
    """Each client has ``classes`` classes (McMahan et al., arXiv 1602.05629), dealt in turn so that all are had by
    about the same number of clients; a class is split evenly over those that have it.

    Raises UsageError R901 when there are not so many classes, or clients cannot cover them.
    """
    labels = np.asarray(labels)
    values = np.unique(labels)
    if classes > len(values):
        raise _impossible(
            f"{classes} classes per client, and the column has {len(values)}", "federate.partition.classes"
        )
    if clients * classes < len(values):
        raise _impossible(
            f"{clients} clients with {classes} classes each leave {len(values) - clients * classes} classes to nobody",
            "more federate.clients or federate.partition.classes",
        )
    generator = np.random.default_rng([seed, 4])
    order = generator.permutation(len(values))
    owners: list[list[int]] = [[] for _ in values]
    for client in range(clients):
        for place in range(classes):
            owners[order[(client * classes + place) % len(values)]].append(client)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for number, value in enumerate(values):
        members = generator.permutation(np.flatnonzero(labels == value))
        for client, piece in zip(owners[number], np.array_split(members, len(owners[number])), strict=True):
            parts[client].extend(piece.tolist())
    return [sorted(part) for part in parts]


def quantity(count: int, clients: int, alpha: float, seed: int, min_size: int) -> list[list[int]]:
    """Random parts whose sizes are Dirichlet(alpha) shares; everybody gets ``min_size`` first.

    Raises UsageError R901 when there are not so many examples.
    """
    if clients * min_size > count:
        raise _impossible(
            f"{clients} clients with {min_size} examples each need {clients * min_size}, and there are {count}",
            "federate.partition.min_size",
        )
    generator = np.random.default_rng([seed, 5])
    shares = generator.dirichlet(np.full(clients, alpha))
    spare = count - clients * min_size
    cuts = np.floor(np.cumsum(shares)[:-1] * spare).astype(int)
    sizes = np.diff(np.concatenate([[0], cuts, [spare]])) + min_size
    order = generator.permutation(count)
    return [sorted(part.tolist()) for part in np.split(order, np.cumsum(sizes)[:-1])]


def sizes_of(parts: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: len(indices) for name, indices in parts.items()}


def check_sizes(sizes: Mapping[str, int], partition: Partition) -> None:
    """Raises UsageError R901 for clients below `min_size`; one without data is named as such."""
    small = {name: size for name, size in sizes.items() if size < max(partition.min_size, 1)}
    if small and not (partition.min_size == 0 and partition.method in ("dirichlet", "quantity")):
        shown = ", ".join(f"client {name} has {size}" for name, size in list(small.items())[:5])
        raise _impossible(
            f"federate.partition.min_size is {partition.min_size}: {shown}", "other settings of federate.partition"
        )


def _impossible(what: str, instead: str) -> UsageError:
    return UsageError("R901", f"the examples cannot be split as asked: {what}", f"change {instead}")
