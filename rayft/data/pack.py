"""Packing: whole examples into bins of at most `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best fit decreasing: longest first, each into the fullest bin with room for it. Deterministic, O(n log n).

    Returns bins of indices into ``lengths`` (tokens per example, each at most ``capacity``); every index stands once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # free tokens -> bins with that much room
    rooms: list[int] = []  # the keys of open_bins, sorted
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        position = bisect_left(rooms, size)
        if position < len(rooms):
            room = rooms[position]
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[position]
            bins[chosen].append(index)
        else:
            room, chosen = capacity, len(bins)
            bins.append([index])
        left = room - size
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(chosen)
    return bins


def positions(lengths: Sequence[int]) -> np.ndarray:
    """int32[sum of lengths]: positions of the tokens of a bin, restarting at 0 with each of its examples."""
    return np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
