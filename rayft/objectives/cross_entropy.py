"""Cross-entropy of next-token prediction, weighted token by token."""

from __future__ import annotations

import torch
from torch.nn import functional


def weighted_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over n of ``weights[n] * -log softmax(logits[n])[targets[n]]``.

    ``logits`` [N, V] of any float type (the softmax is computed in float32), ``targets`` int64 [N], ``weights``
    float32 [N]. Returns a float32 scalar. It is not normalised: the caller divides by the sum of weights of the whole
    optimiser step, which spans micro-batches and workers that this function does not see.
    """
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum()
