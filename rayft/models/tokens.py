"""New tokens: rows for them in the embedding and the head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Give ``tokens``, which the tokenizer knows already, rows that start at the mean of all other rows.

    The matrices grow only where the tokenizer has outgrown them: many models have spare rows. Returns the tokens' ids.
    """
    if not tokens:
        return []
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
        for parameter in module.parameters(recurse=False):  # the head may have a bias
            with _gathered(parameter), torch.no_grad():
                others = torch.ones(len(parameter), dtype=torch.bool)
                others[min(ids) :] = False
                parameter[ids] = parameter[others].float().mean(0).to(parameter.dtype)
    return ids


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Under ZeRO-3 a parameter lies in pieces; inside this context it is whole."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
