"""Attention for padding-free rows where no flash-attention kernel exists: one `sdpa` call per example.

transformers' own `sdpa` isolates examples that lie end to end in a row by a mask over all pairs of the row, which
costs its length squared, mostly to throw the result away. This one costs the sum of the squares of the examples.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayft.config.recipe import Recipe

NAME = "sdpa_per_example"
"""The `attn_implementation` that this module registers with transformers when it is imported."""

LONGEST_BY_MATMUL = 512
"""Tokens. On a CPU in bf16, forward and backward of plain matmuls take 0.4 of the time of torch's flash kernel at 200
tokens and 0.6 at 400, but they keep the probabilities (heads x length squared) for the backward pass."""


def suits(config: Any) -> bool:
    """Whether every layer of this architecture attends to all earlier tokens of its example (no sliding window)."""
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        return getattr(text, "sliding_window", None) is None and getattr(text, "attention_chunk_size", None) is None
    return set(layer_types) == {"full_attention"}


def wanted(recipe: Recipe) -> bool:
    """Whether rows are laid end to end and the choice of attention is ours. Not for a model that will be compiled: the
    number of calls depends on the data."""
    in_rows = recipe.data.padding_free or recipe.data.packing
    return recipe.model.attn_implementation == "auto" and in_rows and not recipe.train.torch_compile


def install(model: PreTrainedModel) -> bool:
    """Use this attention in a model that runs on stock `sdpa` and that it suits; returns whether it does."""
    if model.config.get_text_config()._attn_implementation != "sdpa" or not suits(model.config):
        return False
    model.set_attn_implementation(NAME)
    return True


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None,
    use_vmap: bool,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for one row without padding, cache and overlays: `_attention` reads the borders off the positions."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None and not use_vmap:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **kwargs,
    )
    return mask


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [B, heads, T, D], ``key`` and ``value`` [B, kv heads, T, D] -> [B, T, heads, D].

    ``position_ids`` int64 [1, T] that restart mark the borders between examples.
    """
    one_row = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if not one_row or position_ids is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    lengths = _lengths(position_ids)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    matmul_is_faster = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if matmul_is_faster and q.shape[2] <= LONGEST_BY_MATMUL:
            output = _matmul_attention(q, k, v, scale)
        else:
            grouped = q.shape[1] != k.shape[1]
            output = functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
            )
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of one example, written as two matmuls. Shapes as above with B = 1, returns [1, heads, T, D].

    The query heads that share a key-value head are stacked into one tall matrix, so nothing is repeated.
    """
    kv_heads, length = key.shape[1:3]
    tall = (kv_heads, -1, query.shape[-1])
    scores = (query * scale).reshape(tall) @ key[0].transpose(1, 2)
    future = scores.new_full((length, length), -torch.inf).triu(1)
    probabilities = (scores.view(kv_heads, -1, length, length) + future).softmax(-1)
    return (probabilities.view(kv_heads, -1, length) @ value[0]).view(query.shape)


def _lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the examples in a row: a new one starts wherever the position does not go up by one."""
    positions = position_ids[0]
    starts = (positions.diff() != 1).nonzero().flatten() + 1
    borders = [0, *starts.tolist(), len(positions)]
    return [end - start for start, end in pairwise(borders)]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
