"""Which examples are whose: a client's share of a prepared data set."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rayft.config.data import Source
from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.data.examples import Examples, Selection
from rayft.data.prepare import prepare
from rayft.federate.heterogeneity import Heterogeneity, measure
from rayft.federate.partition import split
from rayft.home import home
from rayft.runs.storage import locate, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTITION = "partition.npz"


@dataclass(frozen=True)
class ClientData(Prepared):
    """Examples of one client, as a data set of its own. It has no validation split: what it holds out is apart."""

    indices: tuple[int, ...] = ()

    def split(self, name: Literal["train", "validation"]) -> Examples | None:
        return Selection(_whole(self.folder), self.indices) if name == "train" else None


@lru_cache(maxsize=64)
def _whole(folder: str) -> Examples:
    """All training examples of a data set, opened once per process; pinned clients have one each."""
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


class Divided:
    """Clients' shares of one prepared data set, which all nodes see."""

    def __init__(self, data: Prepared, shares: Shares) -> None:
        self.data, self.shares = data, shares

    def of(self, client: int) -> tuple[Prepared, np.ndarray]:
        """(data set, indices of the client's training examples in it)."""
        return self.data, self.shares.of(client)

    @property
    def validation(self) -> Examples | None:
        """The recipe's validation data."""
        return self.data.split("validation")


class Pinned:
    """Clients whose sources this node has: each is a data set of its own, in this node's cache."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        sources: Mapping[int, Mapping[str, Any]],
        held: Prepared | None = None,
    ) -> None:
        """sources: client -> its source, plain. held: validation data of the recipe, as a data set that is nothing
        else."""
        self.recipe, self.tokenizer, self.held = recipe, tokenizer, held
        self.sources = {client: Source.model_validate(source) for client, source in sources.items()}
        self._rendered: dict[int, Prepared] = {}

    def of(self, client: int) -> tuple[Prepared, np.ndarray]:
        """As of `Divided`. Raises UsageError R201 and others when the source cannot be read here."""
        if client not in self._rendered:
            data = self.recipe.data.model_copy(update={"train": [self.sources[client]], "validation": None})
            recipe = self.recipe.model_copy(update={"data": data})
            self._rendered[client] = prepare(recipe, self.tokenizer, str(home() / "data"))
        found = self._rendered[client]
        examples = found.split("train")
        assert examples is not None
        return found, np.arange(len(examples))

    @property
    def validation(self) -> Examples | None:
        return None if self.held is None else self.held.split("train")


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
