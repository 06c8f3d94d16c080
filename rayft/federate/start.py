"""What a client trains in a round, and from where."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from rayft.config.federate import RANKED, Federate
from rayft.federate.factors import PREFIX, a_name, b_name, letter, modules
from rayft.federate.messages import Alphas
from rayft.federate.state import State


def trained(federate: Federate, names: Iterable[str], number: int) -> list[str]:
    """Names of the tensors that clients train in round ``number`` (from 1). Tensors of no adapter always are.

    ffa: B only, A stays at its common start (arXiv 2403.12313). rolora: B in odd rounds, A in even ones (2502.01755).
    """
    letters = "AB"
    if federate.method == "ffa":
        letters = "B"
    elif federate.method == "rolora":
        letters = "B" if number % 2 else "A"
    return [name for name in names if not _of_adapter(name) or letter(name) in letters]


def sent(federate: Federate, names: Iterable[str]) -> list[str]:
    """Of the trained tensors those that go back to the server. fedsa: A only; B is the client's own (2410.01463)."""
    return [name for name in names if not (federate.method == "fedsa" and _of_adapter(name) and letter(name) == "B")]


def start(federate: Federate, state: State, alphas: Alphas, rank: int | None) -> dict[str, torch.Tensor]:
    """The tensors that a client of that rank begins with, in the number formats of ``state``.

    A smaller rank takes the leading components, and B carries the ratio of the two scalings, so that the product is the
    truncated one. ``rank`` None: the server's own.
    """
    begun = dict(state)
    if rank is None or federate.method not in RANKED:
        return begun
    for module in modules(state):
        A, B = state[a_name(module)], state[b_name(module)]
        full = A.shape[0]
        if rank < full:
            ratio = alphas.scaling(module, full) / alphas.scaling(module, rank)
            begun[a_name(module)] = A[:rank].clone()
            begun[b_name(module)] = B[:, :rank] * ratio
    return begun


def fresh_a(rank: int, features: int, seed: int, number: int, module: str) -> torch.Tensor:
    """A [rank, features] in fp64 as PEFT begins it: uniform in +-1 / sqrt(features) (Kaiming with a = sqrt 5).

    A pure function of its arguments.
    """
    digest = hashlib.blake2b(f"{seed}/{number}/{module}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    uniform = torch.rand(rank, features, generator=generator, dtype=torch.float64)
    return (2 * uniform - 1) / math.sqrt(features)


def _of_adapter(name: str) -> bool:
    return name.startswith(PREFIX) and ".lora_" in name
