"""Aggregation: pure functions from a server and its clients' answers to the next server. No Ray, no files.

    partials = [partial(setting, server, answers) for each block]     # where the clients are
    server, metrics = finish(setting, server, joined(partials, join))  # where the server is

Sums are fp64. Blocks are `pack_size` clients in the order of their numbers, joined in a fixed binary tree, so the
result does not depend on who computed which block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from rayft.config.federate import REPLACED, ROBUST, Federate
from rayft.federate import lora, optimizers, robust
from rayft.federate.factors import modules, stacked
from rayft.federate.messages import Alphas, Answer, Partial, Server
from rayft.federate.noise import Noise
from rayft.federate.privacy import clipped, denominator, next_clip, noise_multiplier
from rayft.federate.start import sent, start, trained
from rayft.federate.state import State, added, difference, rounded, scaled, size_of, weighted_sum
from rayft.federate.tree import joined


@dataclass(frozen=True)
class Setting:
    """What aggregation must know beside the messages."""

    federate: Federate
    number: int
    """Of the round, from 1."""
    alphas: Alphas = field(default_factory=lambda: Alphas(1.0))
    population: int = 1
    """All clients of the federation."""
    seed: int = 0
    ranks: Sequence[int] = ()
    """Of the clients, in turn; empty: all the server's."""

    def rank_of(self, client: int) -> int | None:
        return self.ranks[client % len(self.ranks)] if self.ranks else None


def reason_to_refuse(setting: Setting, server: Server, answer: Answer) -> str:
    """Why an answer cannot be used, as the end of a sentence; empty when it can."""
    if answer.error:
        return answer.error
    begun = start(setting.federate, server.state, setting.alphas, setting.rank_of(answer.client))
    expected = sent(setting.federate, trained(setting.federate, server.state, setting.number))
    if not answer.state:
        return "it returned nothing"
    if missing := sorted(set(expected) - answer.state.keys()):
        return f"it returned no {missing[0]}"
    if strange := sorted(answer.state.keys() - set(expected)):
        return f"it returned {strange[0]}, which nobody asked for"
    for name in expected:
        if answer.state[name].shape != begun[name].shape:
            return f"{name} has the shape {list(answer.state[name].shape)}, not {list(begun[name].shape)}"
        if not math.isfinite(answer.state[name].sum(dtype=torch.float64)):
            return f"{name} is not finite"
    if answer.examples < 1:
        return "it has no examples"
    for name, tensor in answer.control.items():
        if not torch.isfinite(tensor).all():
            return f"its control variate of {name} is not finite"
    return ""


def partial(setting: Setting, server: Server, answers: Sequence[Answer]) -> Partial:
    """The sums of one block. Answers that cannot be used are left out and named in ``failed``.

    With local privacy each client's noise is added here, where the clients are.
    """
    federate = setting.federate
    total = Partial()
    sums: dict[str, torch.Tensor] = {}
    for answer in sorted(answers, key=lambda answer: answer.client):
        if reason := reason_to_refuse(setting, server, answer):
            total = replace(total, failed=(*total.failed, (answer.client, reason)))
            continue
        if federate.wire == "bf16":
            answer = replace(answer, state=rounded(answer.state, torch.bfloat16))
        one = _one(setting, server, answer)
        total = join(total, replace(one, sums={}))
        for name, term in one.sums.items():
            sums[name] = sums[name].add_(term) if name in sums else term
    return replace(total, sums=sums)


def join(one: Partial, other: Partial) -> Partial:
    """Two partial sums as one."""
    parts = [part.products for part in (one, other) if part.products]
    return Partial(
        weight=one.weight + other.weight,
        clients=(*one.clients, *other.clients),
        sums=added(one.sums, other.sums),
        products=stacked(parts) if parts else {},
        controls=added(one.controls, other.controls),
        members=(*one.members, *other.members),
        unclipped=one.unclipped + other.unclipped,
        facts={
            key: one.facts.get(key, 0.0) + other.facts.get(key, 0.0)
            for key in dict.fromkeys([*one.facts, *other.facts])
        },
        failed=(*one.failed, *other.failed),
    )


def finish(
    setting: Setting, server: Server, total: Partial, noise: Noise | None = None
) -> tuple[Server, dict[str, float]]:
    """(the server after the round, metrics). Without a usable client the server stays, except for its count of rounds.

    noise: for central privacy. metrics: `gap` where it is defined, what accumulator and clipping did.

    Raises UsageError R910 when a robust strategy has too few answers.
    """
    federate, alphas = setting.federate, setting.alphas
    if federate.privacy is None and (not total.clients or not total.weight):
        return replace(server, rounds=server.rounds + 1), {}
    if federate.method in REPLACED and modules(server.state) and not _on_factors(federate):
        merged = lora.merge(federate, server, total, alphas, setting.seed, setting.number)
        return lora.with_state(server, merged.state, accumulator=merged.accumulator), merged.metrics
    metrics: dict[str, float] = {}
    clip = server.clip
    if federate.strategy in ROBUST:
        states = [state for _, _, state in sorted(total.members, key=lambda member: member[0])]
        weights = [weight for _, weight, _ in sorted(total.members, key=lambda member: member[0])]
        aggregated = robust.combine(federate, states, weights)
        change = difference(aggregated, server.state)
    else:
        change = _mean_change(setting, server, total, noise)
        if total.products:
            aggregated = {name: server.state[name].double() + delta for name, delta in change.items()}
            metrics["gap"] = lora.factor_gap(server, total, aggregated, alphas)
        if federate.privacy is not None and federate.privacy.adaptive:
            assert noise is not None and clip is not None
            metrics["clip"] = clip
            clip = next_clip(federate, clip, total.unclipped, setting.population, noise)
    state, moments = optimizers.step(federate, server.state, change, server.moments, setting.number)
    control = added(server.control, scaled(total.controls, 1 / setting.population))
    return lora.with_state(server, state, moments=moments or server.moments, control=control, clip=clip), metrics


def aggregate(
    setting: Setting, server: Server, answers: Sequence[Answer], noise: Noise | None = None
) -> tuple[Server, dict[str, float]]:
    """One round in one call: blocks of `pack_size` clients in the order of their numbers, the tree, `finish`."""
    ordered = sorted(answers, key=lambda answer: answer.client)
    size = setting.federate.pack_size
    parts = [partial(setting, server, ordered[first : first + size]) for first in range(0, len(ordered), size)]
    parts = parts or [Partial()]
    return finish(setting, server, joined(parts, join), noise)


def buffered(
    federate: Federate, server: Server, changes: Sequence[tuple[State, int]]
) -> tuple[Server, dict[str, float]]:
    """FedBuff (arXiv 2106.06639, algorithm 1): w <- w + rate / K x sum of s(tau) x change, s(tau) = 1 / sqrt(1 + tau).

    changes: (change, staleness in versions) of the K updates in the buffer.
    """
    factors = [1 / math.sqrt(1 + staleness) for _, staleness in changes]
    total = weighted_sum([change for change, _ in changes], [factor / len(changes) for factor in factors])
    state = {name: server.state[name].double() + federate.server_rate * change for name, change in total.items()}
    metrics = {"staleness": sum(staleness for _, staleness in changes) / len(changes)}
    return lora.with_state(server, state), metrics


def bytes_sent(answer: Answer, federate: Federate) -> int:
    """Bytes of a client's message."""
    whole = size_of(answer.state) + size_of(answer.control)
    return whole // 2 if federate.wire == "bf16" else whole


def _on_factors(federate: Federate) -> bool:
    return federate.strategy not in ("fedavg", "fedprox")


def _one(setting: Setting, server: Server, answer: Answer) -> Partial:
    """The partial sum of one usable answer."""
    federate, alphas = setting.federate, setting.alphas
    weight = float(answer.examples) if federate.weighted else 1.0
    facts = {
        "examples": float(answer.examples),
        "bytes_up": float(bytes_sent(answer, federate)),
        **{key: float(value) for key, value in answer.facts.items()},
    }
    if "loss" in facts:
        facts["loss"] *= answer.examples
        facts["loss_weight"] = float(answer.examples)
    lone = Partial(clients=(answer.client,), facts=facts, controls={k: t.double() for k, t in answer.control.items()})
    if federate.strategy in ROBUST:
        return replace(lone, weight=weight, members=((answer.client, weight, answer.state),))
    if federate.method == "hetlora":
        weight = lora.heterogeneous_weight(answer, server, alphas)
        padded = lora.padded(answer, server, alphas)
        return replace(
            lone,
            weight=weight,
            sums=scaled(padded, weight),
            products=lora.product_of(answer, server, alphas, weight),
        )
    products = {}
    if federate.privacy is None and federate.method != "fedsa" and modules(server.state):
        products = lora.product_of(answer, server, alphas, weight)
    if federate.method in ("svd", "flora") and products:
        return replace(lone, weight=weight, products=products)
    change: State = difference(answer.state, server.state)
    unclipped = 0
    if federate.privacy is not None:
        change, unclipped = clipped(change, server.clip)
        if federate.privacy.mode == "local" and server.clip is not None:
            noise = Noise(federate.privacy.noise_seed, setting.number, f"client {answer.client}")
            change = noise.added(change, federate.privacy.noise_multiplier * server.clip)
    sums = {name: tensor.mul_(weight) if weight != 1 else tensor for name, tensor in change.items()}
    return replace(lone, weight=weight, sums=sums, products=products, unclipped=unclipped)


def _mean_change(setting: Setting, server: Server, total: Partial, noise: Noise | None) -> dict[str, torch.Tensor]:
    federate = setting.federate
    privacy = federate.privacy
    if privacy is None or privacy.mode == "local":
        weight = total.weight or 1.0
        return {name: value / weight for name, value in total.sums.items()}
    names = sent(federate, trained(federate, server.state, setting.number))
    sums = {name: total.sums.get(name, torch.zeros(server.state[name].shape, dtype=torch.float64)) for name in names}
    if server.clip is not None and privacy.noise_multiplier:
        assert noise is not None
        sums = noise.added(sums, noise_multiplier(federate, setting.population) * server.clip)
    return scaled(sums, 1 / denominator(federate, setting.population))
