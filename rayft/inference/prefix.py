"""Keys and values of prompts that were computed before, by content.

A block is known by the hash of everything that its numbers depend on: tenant, adapter content, strength, and all tokens
from the beginning of the prompt to its end. Blocks are copies: they outlive the request that computed them, and are
copied into the slab of the next one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from rayft.inference.kv_cache import KVCache, Slab


@dataclass(frozen=True)
class _Block:
    keys: dict[int, torch.Tensor]
    """By layer, [heads, block_size, key_dim]."""
    values: dict[int, torch.Tensor]


class PrefixCache:
    """Blocks within the budget of a `KVCache`, the least recently used of which go when requests need it."""

    def __init__(self, cache: KVCache, block_size: int) -> None:
        self.cache, self.block_size = cache, block_size
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        cache.reclaim = self.evict

    def __len__(self) -> int:
        return len(self._blocks)

    def hashes(self, tokens: Sequence[int], tenant: str, adapter: str | None, strength: float) -> list[bytes]:
        """One per whole block of ``tokens``. adapter: content hash."""
        parent = hashlib.sha256(repr((tenant, adapter, strength if adapter else 1.0)).encode()).digest()
        hashes = []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            block = array("q", tokens[start : start + self.block_size]).tobytes()
            parent = hashlib.sha256(parent + block).digest()
            hashes.append(parent)
        return hashes

    def restore(self, hashes: Sequence[bytes], slab: Slab) -> int:
        """Copy the known beginning into an empty slab; returns how many tokens that is."""
        known = list(takewhile(self._blocks.__contains__, hashes))
        for hash in known:
            block, span = self._blocks[hash], slice(slab.length, slab.length + self.block_size)
            for layer in self.cache.layers:
                slab.shelf.keys[layer][slab.row, :, span] = block.keys[layer]
                slab.shelf.values[layer][slab.row, :, span] = block.values[layer]
            slab.length += self.block_size
        self._used(known)
        return slab.length

    def keep(self, hashes: Sequence[bytes], slab: Slab) -> None:
        """Remember these blocks, the first of a slab; stops where the budget has no room."""
        self._used(hashes)
        for number, hash in enumerate(hashes):
            if hash in self._blocks:
                continue
            if not self.cache.take(self.block_size):
                break
            span = slice(number * self.block_size, (number + 1) * self.block_size)
            self._blocks[hash] = _Block(
                {layer: slab.shelf.keys[layer][slab.row, :, span].clone() for layer in self.cache.layers},
                {layer: slab.shelf.values[layer][slab.row, :, span].clone() for layer in self.cache.layers},
            )
        self._used(hashes)

    def _used(self, hashes: Sequence[bytes]) -> None:
        """Beginnings last, so that they are evicted last: blocks without what comes before them are of no use."""
        for hash in reversed(hashes):
            if hash in self._blocks:
                self._blocks.move_to_end(hash)

    def evict(self, tokens: int) -> None:
        """Forget least recently used blocks until this many tokens of budget are free, or none is left."""
        for _ in range(min(-(-tokens // self.block_size), len(self._blocks))):
            self._blocks.popitem(last=False)
            self.cache.give(self.block_size)

    def clear(self) -> None:
        self.evict(len(self) * self.block_size)
