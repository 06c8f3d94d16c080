"""Which adapter each row of a batch goes through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")

BASE = -1
"""The slot of rows that go through the bare base model."""


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``end`` of the batch, in the order of `Route.order`, that belong to one slot."""

    slot: int
    start: int
    end: int


@dataclass
class Route:
    """The adapters of a batch of T rows; T is all leading dimensions of the layers' input, flattened.

    slot: int32[T], the slot of each row, -1 for the bare base.
    strength: float32[T], multiplies the adapter's scaling; None = 1 everywhere.
    step: what the dropout masks are drawn for beside the adapter's seed and the module; one number, or one per slot.
    last: int64[n], the rows that reach the output head, in their order there; None = all.
    """

    slot: torch.Tensor
    strength: torch.Tensor | None = None
    step: int | Mapping[int, int] = 0
    last: torch.Tensor | None = None
    _remembered: dict[object, Any] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return int(self.slot.numel())

    @cached_property
    def order(self) -> torch.Tensor | None:
        """int64[T]: the rows sorted by slot, stable; None where those of each slot lie together already."""
        slots = [segment.slot for segment in _runs(self.slot)]
        if len(slots) == len(set(slots)):
            return None
        return torch.argsort(self.slot, stable=True)

    @cached_property
    def inverse(self) -> torch.Tensor | None:
        """int64[T]: where each row of the batch stands in `order`."""
        return None if self.order is None else torch.argsort(self.order)

    @cached_property
    def segments(self) -> list[Segment]:
        """One segment per slot that occurs, in the order of the rows (sorted by `order` where that is not None)."""
        return _runs(self.slot if self.order is None else self.slot[self.order])

    @cached_property
    def slots(self) -> frozenset[int]:
        """The adapters that occur."""
        return frozenset(segment.slot for segment in self.segments) - {BASE}

    @cached_property
    def of_head(self) -> Route:
        """The rows that the output head sees."""
        if self.last is None:
            return self
        return Route(self.slot[self.last], None if self.strength is None else self.strength[self.last], self.step)

    def rows_of(self, slot: int) -> torch.Tensor:
        """int64[n]: where the rows of a slot are."""
        return self.remember(("rows", slot), lambda: (self.slot == slot).nonzero()[:, 0])

    def step_of(self, slot: int) -> int:
        return self.step if isinstance(self.step, int) else self.step[slot]

    def remember(self, key: object, make: Callable[[], T]) -> T:
        """``make()``, once per key: masks and scales are the same in most layers of a forward pass."""
        if key not in self._remembered:
            self._remembered[key] = make()
        remembered: T = self._remembered[key]
        return remembered


def dropout_seed(seed: int, step: int, module: str) -> int:
    """The seed of the mask that an adapter draws in one module at one step: a pure function, so that recomputation
    under gradient checkpointing, another pack or a resume draws the same mask again."""
    digest = hashlib.blake2b(f"{seed}/{step}/{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _runs(slot: torch.Tensor) -> list[Segment]:
    values, counts = torch.unique_consecutive(slot, return_counts=True)
    borders = [0, *counts.cumsum(0).tolist()]
    return [Segment(value, *border) for value, border in zip(values.tolist(), pairwise(borders), strict=True)]
