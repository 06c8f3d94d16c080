"""Keys and values of the requests in flight.

Each request has one contiguous slab per layer. Slabs of one capacity stand side by side on a shelf, so that decoding
requests of similar length are attended to in one call on a view, without gathering anything. A request that outgrows
its slab moves to the next shelf, a quarter larger; that copies each token a few times in its life, not at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

SMALLEST, BLOCK = 64, 16
"""Tokens: the smallest slab, and the unit in which they grow."""

SPARE = 8192
"""Most tokens that a shelf allocates ahead of need."""


class LayerShape(NamedTuple):
    """What one attention layer keeps per token."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


def capacity_for(tokens: int) -> int:
    """The capacity of the slab that holds this many tokens: at most a quarter more, apart from short ones."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity = max(capacity + BLOCK, capacity * 5 // 4 // BLOCK * BLOCK)
    return capacity


@dataclass(eq=False)
class Slab:
    """Where the keys and values of one request are: a row of a shelf."""

    shelf: Shelf
    row: int
    length: int = 0
    """Tokens that are stored."""


class Shelf:
    """Slabs of one capacity. Free rows are at the end."""

    def __init__(self, capacity: int, layers: Mapping[int, LayerShape], device: torch.device) -> None:
        self.capacity, self.layers, self.device = capacity, layers, device
        self.slabs: list[Slab] = []
        self.rows = 0
        """Allocated; at least as many as there are slabs."""
        self.keys: dict[int, torch.Tensor] = {}
        """By layer, [rows, heads, capacity, key_dim]."""
        self.values: dict[int, torch.Tensor] = {}
        """By layer, [rows, heads, capacity, value_dim]."""

    def add(self) -> Slab:
        """A new slab, zeroed: attention masks what lies behind a request's last token, but 0 times NaN is NaN."""
        if len(self.slabs) == self.rows:
            self._resize(self.rows + max(1, min(self.rows // 2, SPARE // self.capacity)))
        slab = Slab(self, len(self.slabs))
        self.slabs.append(slab)
        for tensor in self._tensors():
            tensor[slab.row].zero_()
        return slab

    def remove(self, slab: Slab) -> None:
        """The last slab takes the free place."""
        last = self.slabs.pop()
        if last is not slab:
            for tensor in self._tensors():
                tensor[slab.row] = tensor[last.row]
            self.slabs[slab.row] = last
            last.row = slab.row
        if len(self.slabs) * 3 <= self.rows:
            self._resize(len(self.slabs))

    def copy(self, source: Slab, target: Slab) -> None:
        """What ``source`` stores, from this shelf to another."""
        other, length = target.shelf, source.length
        for layer in self.layers:
            other.keys[layer][target.row, :, :length] = self.keys[layer][source.row, :, :length]
            other.values[layer][target.row, :, :length] = self.values[layer][source.row, :, :length]
        target.length = length

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.keys.values(), *self.values.values()]

    def _resize(self, rows: int) -> None:
        kept = min(rows, self.rows)
        for layer, shape in self.layers.items():
            for tensors, dim in ((self.keys, shape.key_dim), (self.values, shape.value_dim)):
                resized = torch.empty(rows, shape.heads, self.capacity, dim, dtype=shape.dtype, device=self.device)
                if kept:
                    resized[:kept] = tensors[layer][:kept]
                tensors[layer] = resized
        self.rows = rows


class KVCache:
    """All slabs, within a budget of tokens that the prefix cache shares."""

    def __init__(self, layers: Mapping[int, LayerShape], budget: int, device: torch.device) -> None:
        self.layers, self.budget, self.device = layers, budget, device
        self.used = 0
        """Tokens that are reserved: capacities of slabs, and what others took with `take`."""
        self.shelves: dict[int, Shelf] = {}
        self.reclaim: Callable[[int], None] = lambda tokens: None
        """Called with the number of tokens that are short; may `give` some back."""

    def fits(self, tokens: int) -> bool:
        """Whether a request of this length could ever be held."""
        return capacity_for(tokens) <= self.budget

    def take(self, tokens: int) -> bool:
        """Reserve budget; False where there is too little."""
        if (short := self.used + tokens - self.budget) > 0:
            self.reclaim(short)
        if self.used + tokens > self.budget:
            return False
        self.used += tokens
        return True

    def give(self, tokens: int) -> None:
        self.used -= tokens

    def open(self, tokens: int) -> Slab | None:
        """A slab for this many tokens; None where the budget has too little left."""
        capacity = capacity_for(tokens)
        return self._shelf(capacity).add() if self.take(capacity) else None

    def grow(self, slab: Slab, tokens: int) -> bool:
        """Make room for ``tokens`` in all; False, and nothing changes, where the budget has too little left."""
        shelf = slab.shelf
        if tokens <= shelf.capacity:
            return True
        capacity = capacity_for(tokens)
        if not self.take(capacity - shelf.capacity):
            return False
        target = self._shelf(capacity).add()
        shelf.copy(slab, target)
        self._remove(slab)
        slab.shelf, slab.row = target.shelf, target.row
        slab.shelf.slabs[slab.row] = slab
        return True

    def close(self, slab: Slab) -> None:
        """Free it at once."""
        self.give(slab.shelf.capacity)
        self._remove(slab)

    @property
    def nbytes(self) -> int:
        """Memory that slabs hold at the moment, with what is allocated ahead."""
        return sum(shelf.nbytes for shelf in self.shelves.values())

    def _shelf(self, capacity: int) -> Shelf:
        if capacity not in self.shelves:
            self.shelves[capacity] = Shelf(capacity, self.layers, self.device)
        return self.shelves[capacity]

    def _remove(self, slab: Slab) -> None:
        slab.shelf.remove(slab)
        if not slab.shelf.slabs:
            del self.shelves[slab.shelf.capacity]
