"""One step as the model takes it: the tokens of many requests, end to end in one row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from rayft.inference.attention import Chunk, Decode
from rayft.inference.flight import Flight
from rayft.inference.kv_cache import Slab
from rayft.inference.scheduler import Share
from rayft.multilora.route import Route


@dataclass(frozen=True)
class Batch:
    """T tokens of one step."""

    ids: torch.Tensor
    """int64[1, T]"""
    positions: torch.Tensor
    """int64[1, T]: of each token in its own request."""
    route: Route
    decodes: list[Decode]
    chunks: list[Chunk]
    last: torch.Tensor
    """int64[max(samples, 1)]: where in the row the last tokens of the requests are that choose their next one, in the
    order of the shares."""
    samples: int
    """How many requests that are; a model wants at least one place."""


def pack(shares: list[Share], device: torch.device) -> Batch:
    """Decoding requests by the place of their slabs, then pieces of prompts."""
    single = {_slab(share.flight): share for share in shares if share.tokens == 1}
    order: list[Share] = []
    decodes: list[Decode] = []
    for slabs in _neighbours(list(single)):
        rows = slice(slabs[0].row, slabs[-1].row + 1)
        decodes.append(Decode(slabs[0].shelf, rows, len(order), [slab.length for slab in slabs]))
        order += [single[slab] for slab in slabs]
    start = len(order)
    chunks = []
    for share in shares:
        if share.tokens > 1:
            slab = _slab(share.flight)
            chunks.append(Chunk(slab, start, slab.length, share.tokens))
            order.append(share)
            start += share.tokens
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    strengths: list[float] = []
    last: dict[Flight, int] = {}
    for share in order:
        flight = share.flight
        span = range(flight.computed, flight.computed + share.tokens)
        ids += flight.tokens[span.start : span.stop]
        positions += span
        slots += [flight.slot] * share.tokens
        strengths += [flight.request.strength] * share.tokens
        last[flight] = len(ids) - 1
    samples = [last[share.flight] for share in shares if share.samples]
    sampled = torch.tensor(samples or [0], device=device)
    plain = all(strength == 1.0 for strength in strengths)
    return Batch(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        Route(
            torch.tensor(slots, dtype=torch.int32, device=device),
            None if plain else torch.tensor(strengths, dtype=torch.float32, device=device),
            last=sampled,
        ),
        decodes,
        chunks,
        sampled,
        len(samples),
    )


def _slab(flight: Flight) -> Slab:
    assert flight.slab is not None  # it has a share
    return flight.slab


def _neighbours(slabs: list[Slab]) -> Iterator[list[Slab]]:
    """Groups of slabs that stand side by side on one shelf, in their order there."""
    slabs.sort(key=lambda slab: (slab.shelf.capacity, slab.row))
    numbered = enumerate(slabs)
    for _, group in groupby(numbered, key=lambda pair: (pair[1].shelf.capacity, pair[1].row - pair[0])):
        yield [slab for _, slab in group]
