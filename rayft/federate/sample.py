"""Who takes part in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rayft.config.federate import Federate
from rayft.federate.noise import secure_uniform
from rayft.federate.privacy import expected
from rayft.federate.task import Block


def cohort(federate: Federate, population: int, seed: int, number: int) -> list[int]:
    """The clients of round ``number``, in order. A function of the arguments only; with privacy the coins come from the
    system's secure generator, unless `noise_seed` is given, since who takes part must be as secret as the noise.

    Fixed size with over-selection: so many more. Poisson: a cohort may be empty.
    """
    privacy = federate.privacy
    secure = privacy is not None and privacy.noise_seed is None
    generator = np.random.default_rng([seed, 6, number])
    coins = secure_uniform(population) if secure else 1 - generator.random(population)
    wanted = expected(federate, population)
    if federate.cohort.sampling == "poisson":
        chosen = np.flatnonzero(coins <= wanted / population)
    else:
        count = min(population, math.ceil(wanted * (1 + federate.cohort.over_selection)))
        chosen = np.sort(np.argsort(coins, kind="stable")[:count])
    return [int(client) for client in chosen]


def blocks(clients: Sequence[int], size: int, sites: Sequence[int] = ()) -> list[list[int]]:
    """Neighbours of a cohort, ``size`` at a time: the units of work, in the order of their first clients.

    sites: client -> where its data is pinned; a block is of one site.
    """
    groups: dict[int, list[int]] = {}
    for client in clients:
        groups.setdefault(sites[client] if sites else 0, []).append(client)
    found = [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]
    return sorted(found)


def units(clients: Sequence[int], size: int, kept: Mapping[int, int], sites: Sequence[int] = ()) -> list[Block]:
    """The blocks of a cohort as workers get them."""
    return [
        Block(
            number,
            tuple(group),
            {client: kept[client] for client in group if client in kept},
            sites[group[0]] if sites else None,
        )
        for number, group in enumerate(blocks(clients, size, sites))
    ]


def asked(federate: Federate, population: int) -> float:
    """Clients that begin a round, over-selection counted: expected with Poisson sampling."""
    return min(float(population), expected(federate, population) * (1 + federate.cohort.over_selection))


def blocks_of(federate: Federate, population: int) -> int:
    """Blocks of a round."""
    return math.ceil(asked(federate, population) / federate.pack_size)
