"""A sum of losses over many rows, computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [n, H], targets [n], weights [n]) -> float32 scalar, a sum over the rows."""


def summed_over_chunks(
    chunk_loss: ChunkLoss,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    chunk_rows: int,
) -> torch.Tensor:
    """``chunk_loss`` summed over ``hidden`` [N, H], ``targets`` [N] and ``weights`` [N], ``chunk_rows`` rows at a time.

    What ``chunk_loss`` allocates (a row of logits is as long as the vocabulary) exists for one chunk at a time.
    ``parameters`` are the trainable ones that ``chunk_loss`` uses. No rows at all give 0 with zero gradients, so that
    every parameter takes part in the backward pass of a batch without supervised tokens: DDP waits for all of them.
    """
    chunks = [part.split(chunk_rows) for part in (hidden, targets, weights)]
    if torch.is_grad_enabled():
        return _GradientInForward.apply(chunk_loss, chunks, hidden, *parameters)
    losses = [chunk_loss(*chunk) for chunk in zip(*chunks, strict=True) if len(chunk[0])]
    return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)


class _GradientInForward(torch.autograd.Function):
    """Computes the gradient of each chunk at once, while its logits exist, and only scales it in the backward pass.

    The loss is a scalar, so its gradient is known up to the factor that arrives in ``backward``; that saves
    computing the logits a second time, which checkpointing would do.
    """

    @staticmethod
    def forward(ctx: Any, chunk_loss: ChunkLoss, chunks: list[Any], hidden: torch.Tensor, *parameters: Any) -> Any:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradients = [torch.empty_like(hidden[:0])]
        parameter_gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for rows, targets, weights in zip(*chunks, strict=True):
            if not len(rows):
                continue
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                loss = chunk_loss(rows, targets, weights)
            gradients = torch.autograd.grad(loss, (rows, *parameters), materialize_grads=True)
            total += loss.detach()
            hidden_gradients.append(gradients[0])
            for sum_so_far, gradient in zip(parameter_gradients, gradients[1:], strict=True):
                sum_so_far += gradient
        ctx.save_for_backward(torch.cat(hidden_gradients), *parameter_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> Any:
        # In float32: the factor, one over a number of tokens, rounded to bf16 would scale all gradients by up to 0.4%.
        return None, None, *((g.float() * incoming[0].float()).to(g.dtype) for g in ctx.saved_tensors)
