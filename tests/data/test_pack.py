"""Packing keeps every example whole and once, and fills bins as the plain rule does."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayft.data.pack import pack, positions


@given(st.lists(st.integers(1, 64), max_size=200))
def test_bins_hold_every_example_once_within_the_capacity(lengths: list[int]) -> None:
    bins = pack(lengths, 64)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= 64 for members in bins)
    assert bins == pack(np.array(lengths, np.int32), 64)


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same rule, by looking at every bin."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rooms = [capacity - sum(lengths[member] for member in members) for members in bins]
        fitting = [room for room in rooms if room >= lengths[index]]
        if fitting:
            bins[rooms.index(min(fitting))].append(index)
        else:
            bins.append([index])
    return bins


@given(st.lists(st.integers(1, 30), max_size=60))
def test_fills_bins_as_best_fit_decreasing_does(lengths: list[int]) -> None:
    def fills(bins: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[index] for index in members) for members in bins)

    assert fills(pack(lengths, 30)) == fills(naive(lengths, 30))


def test_known_case() -> None:
    assert pack([3, 7, 5, 2, 8, 4], 10) == [[4, 3], [1, 0], [2, 5]]


def test_positions_restart() -> None:
    assert positions([2, 1, 3]).tolist() == [0, 1, 0, 0, 1, 2]
    assert positions([2]).dtype == np.int32
