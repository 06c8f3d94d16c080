"""Proof, before the first step, that sequences laid end to end do not see each other on this model and backend."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rayft.errors import RunFailed

TOKENS = 32
"""Of each of the two sequences: enough to see a leak, few enough that their logits weigh nothing."""
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
"""Relative L2 distance of logits that rounding explains; a leak of attention gives more than 1e-1."""


def isolation_error(model: nn.Module, first: np.ndarray, second: np.ndarray) -> float:
    """Relative L2 distance between the logits of `second` behind `first` in one row, and of `second` alone.

    first, second: int token ids [L1], [L2].
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device

    def logits(ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        rows = [torch.from_numpy(x.astype(np.int64))[None].to(device) for x in (ids, positions)]
        return model(input_ids=rows[0], position_ids=rows[1], use_cache=False).logits[0].float()

    with torch.no_grad():
        positions = np.concatenate([np.arange(len(first)), np.arange(len(second))])
        together = logits(np.concatenate([first, second]), positions)[len(first) :]
        alone = logits(second, np.arange(len(second)))
    model.train(training)
    return float((together - alone).norm() / alone.norm())


def check_isolation(model: nn.Module, first: np.ndarray, second: np.ndarray, dtype: str) -> None:
    """Raise RunFailed R612 when sequences in one row influence each other."""
    error = isolation_error(model, first[:TOKENS], second[:TOKENS])
    if not error < TOLERANCE[dtype]:
        raise RunFailed(
            "R612",
            "sequences that share a row see each other on this model and attention backend "
            f"(logits differ by {error:.1e}, {TOLERANCE[dtype]:.0e} is rounding)",
            "set data.padding_free=false and data.packing=false, or another model.attn_implementation",
        )
