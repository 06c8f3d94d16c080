"""Which examples are whose: a client's share of a prepared data set."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.data.examples import Examples, Selection
from rayft.federate.heterogeneity import Heterogeneity, measure
from rayft.federate.partition import split
from rayft.runs.storage import locate, write_atomic

PARTITION = "partition.npz"


@dataclass(frozen=True)
class ClientData(Prepared):
    """Examples of one client, as a data set of its own. It has no validation split: what it holds out is apart."""

    indices: tuple[int, ...] = ()

    def split(self, name: Literal["train", "validation"]) -> Examples | None:
        return Selection(_whole(self.folder), self.indices) if name == "train" else None


@lru_cache(maxsize=2)
def _whole(folder: str) -> Examples:
    """All training examples, opened once per process."""
    examples = Prepared(folder, "").split("train")
    assert examples is not None
    return examples


@dataclass(frozen=True)
class Shares:
    """Client number -> name and indices, as `partition.npz` has them."""

    names: tuple[str, ...]
    starts: np.ndarray
    """int64 [clients + 1]: where each client begins in `indices`."""
    indices: np.ndarray

    @classmethod
    def read(cls, path: str) -> Shares:
        with np.load(io.BytesIO(locate(path).read())) as file:
            return cls(tuple(file["names"].tolist()), file["starts"], file["indices"])

    def of(self, client: int) -> np.ndarray:
        return np.asarray(self.indices[self.starts[client] : self.starts[client + 1]])

    @cached_property
    def sizes(self) -> list[int]:
        return [int(size) for size in np.diff(self.starts)]


def held_out(indices: np.ndarray, share: float, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """(to train on, to evaluate on) of a client's examples; one that has a single example keeps it for training."""
    count = min(math.ceil(share * len(indices)), len(indices) - 1) if share else 0
    if count < 1:
        return indices, indices[:0]
    order = np.random.default_rng([seed, 8, client]).permutation(len(indices))
    return np.sort(indices[order[count:]]), np.sort(indices[order[:count]])


def shares_of(recipe: Recipe, prepared: Prepared) -> tuple[dict[str, np.ndarray], Heterogeneity]:
    """Client name -> indices of its training examples, and how much clients differ. Pure.

    Raises UsageError R901 when the settings of the partition cannot be met.
    """
    assert recipe.federate is not None
    examples = prepared.split("train")
    assert examples is not None
    labels = np.asarray(examples.column("label" if recipe.federate.label else "source"))
    parts = split(recipe.federate.partition, labels, recipe.federate.clients, recipe.seed)
    return parts, measure(parts, labels)


def write_shares(recipe_data: dict[str, object], folder: str, hash: str, path: str) -> Heterogeneity:
    """Split the training examples over the clients, where the data is, and write who has which to ``path``.

    Raises UsageError R901 as `shares_of` does.
    """
    parts, found = shares_of(Recipe.model_validate(recipe_data), Prepared(folder, hash))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.array(list(parts)),
        starts=np.cumsum([0, *map(len, parts.values())]),
        indices=np.concatenate(list(parts.values())),
    )
    write_atomic(path, buffer.getvalue())
    return found
