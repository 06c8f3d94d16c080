"""How a pack grows and shrinks."""

from __future__ import annotations

from collections.abc import Callable

from rayft.tune.capacity import Capacity


def passes(capacity: Capacity, seconds_of: Callable[[int], float], count: int = 60) -> list[int]:
    """Sizes that a pack had, one step of every adapter and 10 tokens per adapter in each pass."""
    sizes = []
    for _ in range(count):
        held = capacity.size
        capacity.measure(held, dict.fromkeys(range(held), 1), 10 * held, seconds_of(held))
        sizes.append(held)
    return sizes


def test_it_grows_while_that_pays() -> None:
    capacity = Capacity(64, grow=True)
    sizes = passes(capacity, lambda held: max(1.0, held / 8))  # eight adapters fill the device
    assert sizes[-1] == 8 and sorted(set(sizes)) == [1, 2, 4, 8, 16]
    assert capacity.rates == {1: 10, 2: 20, 4: 40, 8: 80, 16: 80}


def test_it_stays_alone_where_packing_does_not_help() -> None:
    assert passes(Capacity(64, grow=True), lambda held: float(held))[-1] == 1


def test_it_ends_at_the_most() -> None:
    assert max(passes(Capacity(6, grow=True), lambda _: 1.0)) == 6
    assert set(passes(Capacity(6, grow=False), lambda _: 1.0)) == {6}


def test_slow_adapters_are_waited_for() -> None:
    capacity = Capacity(8, grow=True)
    for turn in range(12):  # this adapter has a batch of four passes
        capacity.measure(1, {0: int(turn % 4 == 3)}, 40 if turn % 4 == 3 else 0, 1.0)
    assert capacity.size == 2 and list(capacity.rates) == [1]


def test_a_pack_that_is_not_full_is_not_measured() -> None:
    capacity = Capacity(8, grow=True)
    passes(capacity, lambda _: 1.0, count=3)
    assert capacity.size == 2
    for _ in range(20):
        capacity.measure(1, {0: 1}, 10, 1.0)
    assert capacity.size == 2 and list(capacity.rates) == [1]


def test_out_of_memory_ends_growing() -> None:
    capacity = Capacity(64, grow=True)
    passes(capacity, lambda _: 1.0, count=6)
    capacity.limit(2)
    assert set(passes(capacity, lambda _: 1.0)) == {2}
    capacity.limit(0)
    assert capacity.size == 1
