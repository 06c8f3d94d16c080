"""Aggregation that a few broken or malicious clients cannot move far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rayft.config.federate import Federate
from rayft.errors import UsageError
from rayft.federate.state import State, distance2, weighted_sum


def combine(federate: Federate, states: Sequence[State], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """One state of several, in fp64, as the strategy says.

    Raises UsageError R910 when there are too few clients for krum's or the trimmed mean's settings.
    """
    if federate.strategy == "median":
        return {name: _median([state[name] for state in states]) for name in states[0]}
    if federate.strategy == "trimmed_mean":
        return {name: _trimmed([state[name] for state in states], federate.trim) for name in states[0]}
    chosen = krum(states, federate.byzantine, _wanted(federate, len(states)))
    kept = [weights[index] for index in chosen]
    total = sum(kept)
    return weighted_sum([states[index] for index in chosen], [weight / total for weight in kept])


def krum(states: Sequence[State], byzantine: int, count: int) -> list[int]:
    """The ``count`` states that lie nearest to their neighbours, in their order (Blanchard et al., 2017).

    A state's score is the sum of its squared distances to the n - byzantine - 2 nearest others.
    """
    n = len(states)
    neighbours = n - byzantine - 2
    if n > 1 and neighbours < 1:
        raise UsageError(
            "R910",
            f"krum with {byzantine} malicious clients needs {byzantine + 3} answers, and there are {n}",
            "lower federate.byzantine, or raise federate.cohort.size",
        )
    table = [[distance2(one, other) for other in states] for one in states]
    scores = [sum(sorted(row[:index] + row[index + 1 :])[:neighbours]) for index, row in enumerate(table)]
    ranked = sorted(range(n), key=lambda index: (scores[index], index))
    return sorted(ranked[: max(1, min(count, n))])


def _wanted(federate: Federate, answers: int) -> int:
    if federate.strategy == "krum":
        return 1
    return federate.selected or max(1, answers - federate.byzantine)


def _median(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Coordinate by coordinate; of an even number the mean of the two in the middle (arXiv 1803.01498)."""
    ordered = torch.stack([tensor.double() for tensor in tensors]).sort(dim=0).values
    middle = len(tensors) // 2
    return ordered[middle] if len(tensors) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _trimmed(tensors: Sequence[torch.Tensor], share: float) -> torch.Tensor:
    """The mean without the ``share`` largest and smallest values of each coordinate (arXiv 1803.01498)."""
    count = len(tensors)
    cut = math.floor(share * count)
    ordered = torch.stack([tensor.double() for tensor in tensors]).sort(dim=0).values
    return ordered[cut : count - cut].mean(dim=0)
