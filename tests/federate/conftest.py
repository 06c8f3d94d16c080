"""Adapters of made-up clients, and the settings that put them together."""

from __future__ import annotations

from typing import Any

import torch

from rayft.config.federate import Federate
from rayft.federate.aggregate import Setting
from rayft.federate.factors import a_name, b_name
from rayft.federate.messages import Alphas, Answer, Server
from tests.train.conftest import chat_file, recipe

__all__ = ["chat_file", "recipe"]

MODULES = {"q": (12, 10), "v": (6, 14)}
"""Name -> (out, in)."""


def adapter(rank: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64, size: float = 1.0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for module, (d, k) in MODULES.items():
        state[a_name(module)] = torch.randn(rank, k, generator=draw, dtype=torch.float64).to(dtype)
        state[b_name(module)] = (size * torch.randn(d, rank, generator=draw, dtype=torch.float64)).to(dtype)
    return state


def answers(count: int, rank: int = 3, **options: Any) -> list[Answer]:
    """Clients with unequal amounts of data."""
    return [Answer(n, adapter(rank, seed=100 + n, **options), examples=3 + 5 * n) for n in range(count)]


def setting(number: int = 1, *, alpha: float = 6.0, population: int = 4, ranks: Any = (), **federate: Any) -> Setting:
    return Setting(Federate(**federate), number, Alphas(alpha), population, seed=7, ranks=ranks)


def dense(state: dict[str, torch.Tensor], alpha: float = 6.0) -> dict[str, torch.Tensor]:
    """alpha / rank x B A by module."""
    return {
        module: alpha / len(state[a_name(module)]) * state[b_name(module)].double() @ state[a_name(module)].double()
        for module in MODULES
    }


def dense_mean(clients: list[Answer], weights: list[float] | None = None) -> dict[str, torch.Tensor]:
    """The exact weighted mean of the clients' products, by its definition."""
    weights = weights or [float(client.examples) for client in clients]
    total = sum(weights)
    parts = [dense(dict(client.state)) for client in clients]
    return {
        module: sum((w / total * part[module] for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
        for module in MODULES
    }


def dense_deployed(server: Server, alpha: float = 6.0) -> dict[str, torch.Tensor]:
    """Accumulator plus adapter."""
    own = dense(dict(server.state), alpha)
    for module, (B, A) in server.accumulator.items():
        own[module] = own[module] + B @ A
    return own


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)
