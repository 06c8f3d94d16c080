"""The exact state of what is trained, for checkpoints. `save` writes what inference needs, which can be less."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn

from rayft.models.adalora import adalora_state, load_adalora_state


def training_state(model: nn.Module) -> dict[str, Any]:
    """All weights that are trained, in any phase, as fp32 CPU tensors, and AdaLoRA's scores.

    A model from `adapters.attach` with the same recipe continues exactly from it: full ranks of AdaLoRA, the encoder of
    P-tuning, PiSSA's factors before their conversion.
    """
    state: dict[str, Any] = {"weights": {name: p.detach().cpu().clone() for name, p in _masters(model).items()}}
    if _is_adalora(model):
        state["adalora"] = adalora_state(model)
    return state


def load_training_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put a `training_state` back.

    Raises:
        ValueError: when the state belongs to another recipe: names or shapes differ.
    """
    masters = _masters(model)
    if masters.keys() != state["weights"].keys():
        different = sorted(masters.keys() ^ state["weights"].keys())
        raise ValueError(f"the checkpoint holds other weights than this recipe trains: {', '.join(different[:5])}")
    with torch.no_grad():
        for name, parameter in masters.items():
            parameter.copy_(state["weights"][name])
    if _is_adalora(model):
        load_adalora_state(model, state["adalora"])


def _masters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters; in a model whose weights are trained themselves also those of other phases (all fp32)."""
    adapted = isinstance(model, PeftModel)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or (not adapted and parameter.dtype == torch.float32)
    }


def _is_adalora(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.peft_config["default"], AdaLoraConfig)
