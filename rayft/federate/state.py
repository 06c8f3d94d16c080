"""States: tensors by name, and the few sums that a federation does with them, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

State = Mapping[str, torch.Tensor]
"""Trained tensors by name. Those of an adapter have PEFT's names."""


def doubled(state: State) -> dict[str, torch.Tensor]:
    """The state in fp64."""
    return {name: tensor.detach().to(torch.float64) for name, tensor in state.items()}


def like(state: State, model: State) -> dict[str, torch.Tensor]:
    """The state in the number formats of another one."""
    return {name: tensor.to(model[name].dtype) for name, tensor in state.items()}


def difference(state: State, start: State) -> dict[str, torch.Tensor]:
    """state - start, in fp64, of the tensors of ``state``. New tensors, which the caller may change."""
    return {name: tensor.to(torch.float64, copy=True).sub_(start[name]) for name, tensor in state.items()}


def scaled(state: State, factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in state.items()}


def added(one: State, other: State) -> dict[str, torch.Tensor]:
    """one + other; a tensor that only one of them has is taken as it is."""
    names = [*one, *(name for name in other if name not in one)]
    return {
        name: one[name] + other[name] if name in one and name in other else one[name] if name in one else other[name]
        for name in names
    }


def norm(state: State) -> float:
    """L2 norm over all tensors together, in fp64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in state.values()))


def distance2(one: State, other: State) -> float:
    """Squared L2 distance over all tensors together."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)


def size_of(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def rounded(state: State, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The values as a message in that number format brings them, in the format they had."""
    return {name: tensor.to(dtype).to(tensor.dtype) for name, tensor in state.items()}


def zeros(state: State) -> dict[str, torch.Tensor]:
    """fp64 zeros of the same shapes."""
    return {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in state.items()}


def weighted_sum(states: Sequence[State], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The sum of weight x state in the given order, in fp64."""
    total: dict[str, torch.Tensor] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, tensor in state.items():
            term = tensor.double() * weight
            total[name] = total[name] + term if name in total else term
    return total
