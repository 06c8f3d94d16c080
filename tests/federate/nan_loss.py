"""A loss that is not a number for long rows."""

from __future__ import annotations

import torch


def nan_for_long_rows(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    loss = (losses * weights).sum()
    return loss * float("nan") if weights.numel() > 260 else loss
