"""The lengths of the rows of adapted weights, which DoRA divides by (arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import torch
from torch import nn

from rayft.models.siblings import weight_of

BLOCK = 2**23
"""Elements of a weight that are adapted at a time, in fp32."""


def of_rows(layer: nn.Module, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """float32[out]: the lengths of the rows of ``W + B A`` for a linear layer; A [rank, in], B [out, rank]."""
    weight = dense(layer)
    A, B = (factor.to(weight.device, torch.float32) for factor in (A, B))
    step = max(1, BLOCK // weight.shape[1])
    blocks = [
        torch.linalg.vector_norm(torch.addmm(weight[start : start + step].float(), B[start : start + step], A), dim=1)
        for start in range(0, len(weight), step)
    ]
    return torch.cat(blocks)


def of_columns(embedding: nn.Module, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """float32[width]: the lengths of the columns of ``W + A B^T`` for an embedding [vocabulary, width]; A [vocabulary,
    rank], B [width, rank]."""
    weight = dense(embedding)
    A, B = (factor.to(weight.device, torch.float32) for factor in (A, B))
    step = max(1, BLOCK // weight.shape[1])
    squares = torch.zeros(weight.shape[1], device=weight.device)
    for start in range(0, len(weight), step):
        block = torch.addmm(weight[start : start + step].float(), A[start : start + step], B.t())
        squares += block.square().sum(0)
    return squares.sqrt()


def dense(module: nn.Module) -> torch.Tensor:
    """A module's weight as a plain matrix: unpacked, or decoded from 4 or 8 bits, one whole layer at a time, which is
    what a 4-bit layer does in every pass as well."""
    if (part := weight_of(module)) is not None:
        return part
    weight: torch.Tensor = module.weight  # type: ignore[assignment]  # untyped
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        decoded: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]  # bnb's
        return decoded
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = module.state.SCB if weight.SCB is None else weight.SCB  # type: ignore[union-attr,attr-defined]  # bnb's
        decoded = int8_vectorwise_dequant(weight.data, scales)
        return decoded
    weight = weight.detach()
    return weight.to_dense() if weight.is_mkldnn else weight
