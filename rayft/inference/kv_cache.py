"""Keys and values of the requests in flight.

Each request has one contiguous slab per layer. Slabs of one capacity stand side by side on a shelf, so that decoding
requests of similar length are attended to in one call on a view, without gathering anything. A request that outgrows
its slab moves to the next shelf, which copies each token a few times in its life, not at every step. Short slabs
double, so that a batch stands on few shelves, each of which is a call of its own in every layer; long ones, where
memory counts more than calls, grow by a quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

SMALLEST, LONG, BLOCK = 64, 512, 16
"""Tokens: the smallest slab, the one up to which they double, and the unit in which longer ones grow."""

FEWEST = 8
"""Slabs that a shelf begins with."""

SPARE = 8192
"""Most tokens that a shelf allocates ahead of need."""


class LayerShape(NamedTuple):
    """What one attention layer keeps per token."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


_Kind = tuple[int, int, int, torch.dtype]
"""0 for keys and 1 for values, heads, dim, dtype."""


def capacity_for(tokens: int) -> int:
    """The capacity of the slab that holds this many tokens: at most a quarter more, up to `LONG` at most twice."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity = capacity * 2 if capacity < LONG else capacity * 5 // 4 // BLOCK * BLOCK
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
        self.dtype = next(iter(layers.values())).dtype
        self.slabs: list[Slab] = []
        self.rows = 0
        """Allocated; at least as many as there are slabs."""
        self.keys: dict[int, torch.Tensor] = {}
        """By layer, [rows, heads, capacity, key_dim]."""
        self.values: dict[int, torch.Tensor] = {}
        """By layer, [rows, heads, capacity, value_dim]."""
        self._blocks: dict[_Kind, torch.Tensor] = {}
        """What the two above are views of, [layers of this kind, rows, heads, capacity, dim]. What happens to a row
        happens to all layers in one call."""

    def add(self) -> Slab:
        """A new slab, zeroed: attention masks what lies behind a request's last token, but 0 times NaN is NaN."""
        if len(self.slabs) == self.rows:
            self._resize(self.rows + max(1, min(max(self.rows, FEWEST), SPARE // self.capacity)))
        slab = Slab(self, len(self.slabs))
        self.slabs.append(slab)
        for block in self._blocks.values():
            block[:, slab.row].zero_()
        return slab

    def remove(self, slab: Slab) -> None:
        """The last slab takes the free place."""
        last = self.slabs.pop()
        if last is not slab:
            for block in self._blocks.values():
                block[:, slab.row] = block[:, last.row]
            self.slabs[slab.row] = last
            last.row = slab.row
        if len(self.slabs) * 4 <= self.rows and self.rows > FEWEST:
            self._resize(max(len(self.slabs), FEWEST))

    def copy(self, source: Slab, target: Slab) -> None:
        """What ``source`` stores, from this shelf to another."""
        length = source.length
        for shape, block in self._blocks.items():
            target.shelf._blocks[shape][:, target.row, :, :length] = block[:, source.row, :, :length]
        target.length = length

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def _resize(self, rows: int) -> None:
        kept = min(rows, self.rows)
        for kind, tensors in enumerate((self.keys, self.values)):
            numbers: dict[_Kind, list[int]] = {}
            for number, layer in self.layers.items():
                dim = layer.value_dim if kind else layer.key_dim
                numbers.setdefault((kind, layer.heads, dim, layer.dtype), []).append(number)
            for shape, group in numbers.items():
                _, heads, dim, dtype = shape
                block = torch.empty(len(group), rows, heads, self.capacity, dim, dtype=dtype, device=self.device)
                if kept:
                    block[:, :kept] = self._blocks[shape][:, :kept]
                self._blocks[shape] = block
                tensors.update(zip(group, block, strict=True))
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
