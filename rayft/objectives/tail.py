"""What an architecture does to the output of its head before calling it logits: scaling, soft-capping, or nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class Tail:
    """The part of a causal language model's ``forward`` that comes after the head, as a function of the head's output.

    It is the architecture's own code that runs, on a shallow copy of the model in which decoder and head are replaced
    by stand-ins, so that no table of ``final_logit_softcapping``, ``logit_scale`` and their kin is needed.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:
        stand_ins = {model.base_model_prefix: self._decode}
        stand_ins |= {name: self._project for name, child in model.named_children() if child is head}
        self._model = copy.copy(model)
        self._model._modules = model._modules | stand_ins
        self._head_output: torch.Tensor | None = None

    def __call__(self, head_output: torch.Tensor) -> torch.Tensor:
        """``head_output`` [n, V] to logits [n, V]."""
        self._head_output = head_output[None]
        logits: torch.Tensor = type(self._model).forward(self._model, inputs_embeds=self._head_output).logits[0]
        self._head_output = None
        return logits

    def _decode(self, *args: Any, **kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(self._head_output)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor | None:
        return self._head_output


class _DecoderOutput:
    """A decoder's output with nothing in it but the last hidden state."""

    def __init__(self, last_hidden_state: torch.Tensor | None) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None
