"""Evaluation of a round: on the recipe's validation data, and by the clients on what they hold out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft.config.federate import Federate
from rayft.errors import RunFailed
from rayft.federate.pool import DYING, Pool
from rayft.federate.sample import units
from rayft.federate.task import Block, Measured, Task


def score(row: Mapping[str, Any]) -> float | None:
    """What rounds are compared by: the central loss, else the clients'; None where nothing was evaluated."""
    value = row.get("validation_loss", row.get("federated_loss"))
    return float(value) if value is not None and math.isfinite(value) else None


def chosen(federate: Federate, population: int, seed: int, number: int) -> list[int]:
    """The clients that evaluate a round."""
    wanted = federate.evaluate.clients
    count = min(population, max(1, round(wanted * population if wanted <= 1 else wanted)))
    if count == population:
        return list(range(population))
    order = np.random.default_rng([seed, 9, number]).permutation(population)[:count]
    return [int(client) for client in np.sort(order)]


def measure(
    pool: Pool,
    task: Task,
    clients: list[int],
    kept: Mapping[int, int],
    pack_size: int,
    retries: int,
    sites: Sequence[int] = (),
) -> list[Measured]:
    """The losses of all clients that hold something out, in order; those of a place that is gone are left out."""
    blocks: dict[Hashable, Block] = {("evaluate", unit.number): unit for unit in units(clients, pack_size, kept, sites)}
    shared = pool.share(task)
    calls = {key: (shared, unit) for key, unit in blocks.items()}
    found = _all(pool, "evaluate", calls, retries, {key: unit.site for key, unit in blocks.items()})
    measured = [one for key in blocks if not isinstance(found[key], _Gone) for one in found[key]]
    return sorted(measured, key=lambda one: one.client)


def summary(losses: Sequence[Measured]) -> dict[str, float]:
    """``federated_loss`` (weighted by examples), ``federated_median``, and ``federated_worst_decile``, the mean of the
    worst tenth of the clients."""
    if not losses:
        return {}
    values = np.array([one.loss for one in losses])
    weights = np.array([one.examples for one in losses], dtype=float)
    worst = np.sort(values)[-math.ceil(len(values) / 10) :]
    return {
        "federated_loss": float(np.average(values, weights=weights)),
        "federated_median": float(np.median(values)),
        "federated_worst_decile": float(worst.mean()),
    }


def call(pool: Pool, method: str, *arguments: Any, retries: int) -> Any:
    """One call to any worker. Raises RunFailed R922 when workers keep dying under it, or none can be."""
    found = _all(pool, method, {method: arguments}, retries)[method]
    if isinstance(found, _Gone):
        raise RunFailed("R922", f"there is no worker left for `{method}`: {found.reason}", DYING)
    return found


@dataclass(frozen=True)
class _Gone:
    reason: str


def _all(
    pool: Pool,
    method: str,
    calls: Mapping[Hashable, Sequence[Any]],
    retries: int,
    sites: Mapping[Hashable, int | None] | None = None,
) -> dict[Hashable, Any]:
    """Key -> what its call returned, or that its site is gone."""
    waiting, deaths = deque(calls), dict.fromkeys(calls, 0)
    place = (sites or {}).get
    found: dict[Hashable, Any] = {}
    while len(found) < len(calls):
        for key in list(waiting):
            if pool.free(place(key)):
                pool.submit(key, method, *calls[key], site=place(key))
            elif reason := pool.gone(place(key)):
                found[key] = _Gone(reason)
            else:
                continue
            waiting.remove(key)
        for done in pool.wait(1.0, calls):
            if not done.lost:
                found[done.key] = done.value
                continue
            deaths[done.key] += 1
            if deaths[done.key] > retries >= 0:
                raise RunFailed(
                    "R922",
                    f"workers keep dying (in `{method}`): {done.lost}",
                    DYING,
                )
            waiting.append(done.key)
    return found
