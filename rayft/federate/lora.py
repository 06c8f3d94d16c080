"""From the sums of a round to the next adapter: what each way of putting LoRA factors together does.

Throughout, the exact mean is sum_k p_k s_k B_k A_k, and what is deployed is the accumulator plus s B A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from rayft.config.federate import Federate
from rayft.federate.factors import (
    Products,
    a_name,
    b_name,
    decomposed,
    frobenius,
    gap,
    modules,
    negated,
    products,
    stacked,
    truncated,
)
from rayft.federate.messages import Alphas, Answer, Partial, Server
from rayft.federate.start import fresh_a
from rayft.federate.state import like


@dataclass(frozen=True)
class Merged:
    """A round's result before its server optimiser: the factors, the accumulator, and what was lost."""

    state: dict[str, torch.Tensor]
    """fp64."""
    accumulator: Products
    metrics: dict[str, float] = field(default_factory=dict)


def scalings(state: dict[str, torch.Tensor], alphas: Alphas) -> dict[str, float]:
    """By module, for the rank that the state has there."""
    return {module: alphas.scaling(module, state[a_name(module)].shape[0]) for module in modules(state)}


def product_of(answer: Answer, server: Server, alphas: Alphas, weight: float = 1.0) -> Products:
    """weight x s_k B_k A_k of a client; a factor that it did not train is the server's."""
    state = {**server.state, **answer.state}
    return products(state, scalings(state, alphas), weight)


def padded(answer: Answer, server: Server, alphas: Alphas) -> dict[str, torch.Tensor]:
    """A client's factors with zeros up to the server's rank (HetLoRA, arXiv 2401.06432); B carries the ratio of the
    scalings."""
    filled = {}
    for module in modules(answer.state):
        A, B = answer.state[a_name(module)].double(), answer.state[b_name(module)].double()
        full, rank = server.state[a_name(module)].shape[0], A.shape[0]
        ratio = alphas.scaling(module, rank) / alphas.scaling(module, full)
        filled[a_name(module)] = torch.cat([A, A.new_zeros(full - rank, A.shape[1])])
        filled[b_name(module)] = torch.cat([B * ratio, B.new_zeros(B.shape[0], full - rank)], dim=1)
    return filled


def merge(federate: Federate, server: Server, partial: Partial, alphas: Alphas, seed: int, number: int) -> Merged:
    """The methods that replace factors or keep an accumulator: svd, fedex, flora and hetlora."""
    mean = {module: (B / partial.weight, A) for module, (B, A) in partial.products.items()}
    if federate.method == "flora":
        state, put_aside = _fresh(server, seed, number), mean
    elif federate.method == "svd":
        state, put_aside = _projected(server, mean, alphas, seed, number, residual=federate.residual)
    else:
        divided = {name: total / partial.weight for name, total in partial.sums.items()}
        if federate.method == "fedex":
            state = {name: server.state[name].double() + change for name, change in divided.items()}
            put_aside = _lacking(server, mean, state, alphas)
        else:
            state, put_aside = divided, {}
    accumulator = stacked([server.accumulator, put_aside]) if put_aside else server.accumulator
    metrics: dict[str, float] = {}
    if federate.accumulator_rank is not None and accumulator:
        accumulator, metrics["truncation_error"] = _cut(accumulator, federate.accumulator_rank)
    sent = {name: tensor.double() for name, tensor in like(state, server.state).items()}
    metrics["gap"] = gap([server.accumulator, mean], [accumulator, products(sent, scalings(sent, alphas))], mean)
    if accumulator:
        metrics["accumulator_rank"] = max(B.shape[1] for B, _ in accumulator.values())
    return Merged(state, accumulator, metrics)


def factor_gap(server: Server, partial: Partial, state: dict[str, torch.Tensor], alphas: Alphas) -> float:
    """The gap where factors are averaged one by one: s B A of the mean factors against the mean of the products."""
    mean = {module: (B / partial.weight, A) for module, (B, A) in partial.products.items()}
    full = {**{name: tensor.double() for name, tensor in server.state.items()}, **state}
    return gap([mean], [products(full, scalings(full, alphas))], mean)


def deployed(server: Server, alphas: Alphas) -> dict[str, torch.Tensor]:
    """One plain adapter that does what accumulator and factors do together, fp32: rank is the sum of both, the same in
    every module (filled up with zeros), and scaling is 1. Without an accumulator the factors as they are."""
    if not server.accumulator:
        return {name: tensor.float() for name, tensor in server.state.items()}
    state = {name: tensor.double() for name, tensor in server.state.items()}
    own = products(state, scalings(state, alphas))
    together = {
        module: (torch.cat([B, server.accumulator[module][0]], dim=1), torch.cat([A, server.accumulator[module][1]]))
        for module, (B, A) in own.items()
    }
    rank = max(B.shape[1] for B, _ in together.values())
    tensors = {}
    for module, (B, A) in together.items():
        more = rank - B.shape[1]
        tensors[a_name(module)] = torch.cat([A, A.new_zeros(more, A.shape[1])]).float()
        tensors[b_name(module)] = torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1).float()
    return tensors


def heterogeneous_weight(answer: Answer, server: Server, alphas: Alphas) -> float:
    """HetLoRA's weight of a client: the Frobenius norm of its product."""
    return frobenius(product_of(answer, server, alphas))


def with_state(server: Server, state: dict[str, torch.Tensor], **changes: object) -> Server:
    """The server after a round, its tensors in the number formats they had."""
    state = like({**server.state, **state}, server.state)
    return replace(server, state=state, rounds=server.rounds + 1, **changes)  # type: ignore[arg-type]  # its own fields


def _fresh(server: Server, seed: int, number: int) -> dict[str, torch.Tensor]:
    """New random A and B = 0 (FLoRA, arXiv 2409.05976)."""
    state = {}
    for module in modules(server.state):
        rank, features = server.state[a_name(module)].shape
        state[a_name(module)] = fresh_a(rank, features, seed, number, module)
        state[b_name(module)] = torch.zeros(server.state[b_name(module)].shape, dtype=torch.float64)
    return state


def _projected(
    server: Server, mean: Products, alphas: Alphas, seed: int, number: int, *, residual: bool
) -> tuple[dict[str, torch.Tensor], Products]:
    """The best approximation of the mean at the server's rank (FlexLoRA, arXiv 2402.11505), and what it lacks.

    A keeps the length it was initialised with, so that the next round begins in the regime that LoRA's learning rates
    are made for; its rows are orthogonal.
    """
    state = {}
    for module, product in mean.items():
        former = server.state[a_name(module)].double()
        rank, features = former.shape
        length = float(former.norm()) / math.sqrt(rank) or 1.0
        U, S, V = decomposed(product)
        found = min(rank, len(S))
        A = fresh_a(rank, features, seed, number, module)
        A[:found] = length * V[:found]
        B = torch.zeros(U.shape[0], rank, dtype=torch.float64)
        B[:, :found] = U[:, :found] * S[:found] / (length * alphas.scaling(module, rank))
        state[a_name(module)], state[b_name(module)] = A, B
    return state, _lacking(server, mean, state, alphas) if residual else {}


def _lacking(server: Server, mean: Products, state: dict[str, torch.Tensor], alphas: Alphas) -> Products:
    """The mean less what the factors hold once they are rounded to the number format of the server's."""
    sent = {name: tensor.double() for name, tensor in like(state, server.state).items()}
    return stacked([mean, negated(products(sent, scalings(sent, alphas)))])


def _cut(accumulator: Products, rank: int) -> tuple[Products, float]:
    """Every module truncated, and the Frobenius norm of all that was cut off over that of the whole."""
    whole = frobenius(accumulator)
    cut, lost = {}, 0.0
    for module, product in accumulator.items():
        cut[module], error = truncated(product, rank)
        lost += error**2
    return cut, math.sqrt(lost) / whole if whole else 0.0
