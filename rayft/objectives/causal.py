"""The loss of `sft` and `clm`: weighted next-token cross-entropy, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from rayft.functions import load_function
from rayft.objectives.chunks import summed_over_chunks
from rayft.objectives.cross_entropy import weighted_cross_entropy
from rayft.objectives.tail import Tail

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, V], targets int64 [n], weights float32 [n]) -> scalar, a sum over the rows: called chunk by chunk."""

CHUNK_ROWS = 256
"""Rows of logits alive at a time: enough for an efficient matmul, an eighth of a batch of 8 x 256 tokens."""


def own_loss(spec: str | None) -> LossFunction | None:
    """The function that `train.loss_function` names, None for the standard loss. Raises UsageError R614."""
    return None if spec is None else load_function(spec, "train.loss_function", "R614")


def install(model: Any, *, loss_function: LossFunction | None = None, chunk_rows: int = CHUNK_ROWS) -> None:
    """Teach ``model``, a Hugging Face causal LM or the PEFT model around one, to take ``loss_weights``.

    Called with ``input_ids`` int64 [B, T] and ``loss_weights`` float32 [B, T], it returns an output whose ``loss`` is
    the sum over tokens of ``loss_weights[t] * CE(logits[t - 1], input_ids[t])``, a float32 scalar that is not
    normalised, and whose ``logits`` are None. The labels are shifted here and nowhere else. Rows without weight never
    reach the head; the others pass it ``chunk_rows`` at a time. A batch without any weight has loss 0 and zero
    gradients. Called without ``loss_weights`` the model is what it was before.

    With ``segments``, lengths that sum to T of parts that lie end to end in one row (B = 1), ``loss`` is float32
    [parts]: one sum per part, each over its own tokens, and no two parts have logits at the same time.

    Call it last, on the outermost model: after adapters are attached, before DDP or DeepSpeed wrap it.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    tail = Tail(causal, head)
    row_losses = loss_function or weighted_cross_entropy
    stock_forward = model.forward

    @functools.wraps(stock_forward)  # `generate` reads the signature to know which inputs to prepare
    @torch.compiler.disable(recursive=False)  # only what is called from here is compiled: the decoder, not the loss
    def forward(
        input_ids: Any = None,
        *,
        loss_weights: torch.Tensor | None = None,
        segments: Sequence[int] | None = None,
        **inputs: Any,
    ) -> Any:
        if loss_weights is None:
            return stock_forward(input_ids=input_ids, **inputs)

        @torch.compiler.disable
        def loss_of(head_forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
            def chunk_loss(rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
                return row_losses(tail(head_forward(rows)), targets, weights)

            supervised = _supervised(hidden, input_ids, loss_weights, segments or [input_ids.shape[1]])
            if _gathers_its_parts(head):
                return torch.stack([chunk_loss(*rows) for rows in supervised])
            trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
            return torch.stack(
                [
                    summed_over_chunks(chunk_loss, *rows, parameters=trainable, chunk_rows=chunk_rows)
                    for rows in supervised
                ]
            )

        with _computing(head, loss_of) as answers:
            stock_forward(input_ids=input_ids, **{"use_cache": False} | inputs)
        return CausalLMOutputWithPast(loss=answers[0].squeeze() if segments is None else answers[0].flatten())

    model.forward = forward


@contextmanager
def _computing(head: nn.Module, loss_of: Callable[..., torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """While open, calling ``head`` gives ``loss_of(its own forward, hidden)`` instead of logits; yields what it gave.

    The loss is computed inside the head's call, so that whatever surrounds that call (ZeRO-3 gathers the head's
    weights there, and again for the backward pass) is done once for all chunks.
    """
    answers: list[torch.Tensor] = []
    stock_forward, own = head.forward, vars(head).get("forward")
    head.forward = lambda hidden: loss_of(stock_forward, hidden).reshape(1, 1, -1)
    hook = head.register_forward_hook(lambda module, inputs, output: answers.append(output))
    try:
        yield answers
    finally:
        hook.remove()
        del head.forward
        if own is not None:
            head.forward = own


def _gathers_its_parts(head: nn.Module) -> bool:
    """Whether ZeRO-3 gathers and releases parts of the head (LoRA matrices on it) one by one, forward and backward.

    Their gradients can then be had from the backward pass only, so the logits of all supervised rows are kept.
    """
    return any(True for _ in head.children()) and any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _supervised(
    hidden: torch.Tensor, input_ids: torch.Tensor, loss_weights: torch.Tensor, segments: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows that are trained on, by segment: hidden states [N, H], the tokens they predict [N], their weights [N].

    ``hidden`` is longer than ``input_ids`` where virtual tokens stand in front (prompt tuning): the last of them
    predicts the first token.
    """
    virtual = hidden.shape[1] - input_ids.shape[1]
    targets = functional.pad(input_ids, (virtual, 0))[:, 1:].flatten()
    weights = functional.pad(loss_weights, (virtual, 0))[:, 1:].flatten()
    rows = weights.nonzero().squeeze(1)
    whole = hidden[:, :-1].flatten(0, 1).index_select(0, rows), targets[rows], weights[rows]
    if len(segments) == 1:
        return [whole]
    ends = torch.tensor(segments, device=rows.device).cumsum(0)
    owners = torch.searchsorted(ends, rows + 1, right=True)  # a row belongs to the segment of the token it predicts
    counts: list[int] = owners.bincount(minlength=len(segments)).tolist()
    return list(zip(*(part.split(counts) for part in whole), strict=True))
