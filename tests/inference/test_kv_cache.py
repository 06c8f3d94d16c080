"""Slabs that come, grow, move and go keep what they hold, and nothing else."""

from __future__ import annotations

import random

import pytest
import torch

from rayft.inference.kv_cache import KVCache, LayerShape, Slab, capacity_for

LAYERS = {0: LayerShape(2, 3, 5, torch.float32), 1: LayerShape(1, 4, 4, torch.float32)}


def cache(budget: int) -> KVCache:
    return KVCache(LAYERS, budget, torch.device("cpu"))


def test_a_slab_is_at_most_a_quarter_larger_than_needed_and_a_short_one_at_most_twice_as_large() -> None:
    for tokens in range(1, 5000):
        capacity = capacity_for(tokens)
        assert tokens <= capacity <= max(64, min(512, 2 * tokens), tokens * 1.25)
        assert capacity_for(capacity) == capacity


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_keep_their_own_numbers(seed: int) -> None:
    generator = random.Random(seed)
    kv = cache(3000)
    live: dict[Slab, int] = {}
    serial = 0
    most = 0
    for _ in range(400):
        choice = generator.random()
        if choice < 0.3:
            slab = kv.open(generator.randrange(1, 200))
            if slab is None:
                assert kv.used + 64 > 3000 or kv.used > 2500
                continue
            serial += 1
            live[slab] = serial
        elif live and choice < 0.85:
            slab = generator.choice(list(live))
            before = kv.used, slab.shelf.capacity
            length = slab.length + generator.randrange(1, 60)
            if not kv.grow(slab, length):
                assert (kv.used, slab.shelf.capacity) == before
                continue
            for layer in LAYERS:
                new = torch.arange(slab.length, length) + 1000 * live[slab] + layer / 2
                slab.shelf.keys[layer][slab.row, :, slab.length : length] = new[:, None]
                slab.shelf.values[layer][slab.row, :, slab.length : length] = -new[:, None]
            slab.length = length
        elif live:
            slab = generator.choice(list(live))
            for layer in LAYERS:  # what a request left behind is nobody's business
                slab.shelf.keys[layer][slab.row] = torch.nan
            kv.close(slab)
            del live[slab]
        most = max(most, len(live))
        assert kv.used == sum(slab.shelf.capacity for slab in live) <= 3000
        for slab, number in live.items():
            for layer in LAYERS:
                expected = (torch.arange(slab.length) + 1000 * number + layer / 2)[:, None]
                keys, values = slab.shelf.keys[layer][slab.row], slab.shelf.values[layer][slab.row]
                assert (keys[:, : slab.length] == expected).all() and (values[:, : slab.length] == -expected).all()
                assert keys[:, slab.length :].isfinite().all() and values.isfinite().all()
    assert most > 8
    for slab in live:
        kv.close(slab)
    assert (kv.used, kv.nbytes, kv.shelves) == (0, 0, {})


def test_what_is_short_is_asked_back_first() -> None:
    kv = cache(128)
    assert kv.take(80)
    asked: list[int] = []

    def reclaim(tokens: int) -> None:
        asked.append(tokens)
        if len(asked) == 1:
            kv.give(80)

    kv.reclaim = reclaim
    assert kv.open(64) is not None
    assert kv.open(65) is None
    assert asked == [16, 64]
    assert kv.fits(128) and not kv.fits(129)
