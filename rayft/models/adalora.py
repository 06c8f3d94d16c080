"""AdaLoRA (arXiv 2303.10512) in our own training step: its penalty, its budget, and the state that a resume needs."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

TENSORS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Importance of every weight, its moving average, and the moving average of its uncertainty (equations 8 to 10)."""


def orthogonal_penalty(model: nn.Module) -> torch.Tensor:
    """``orth_reg_weight`` times the mean of ``|P^T P - I|_F`` and ``|Q Q^T - I|_F`` over all layers; fp32 scalar.

    Equation 4 of the paper with the norm and the mean that PEFT takes. To be added once to the loss of an optimiser
    step; PEFT's own addition, once per forward pass, is switched off by `adapters.attach`.
    """
    adapted = _adapted(model)
    factors = [p if ".lora_A." in n else p.T for n, p in adapted.named_parameters() if _is_factor(n)]
    norms = [torch.linalg.matrix_norm(q @ q.T - torch.eye(len(q), device=q.device)) for q in factors]
    return adapted.peft_config["default"].orth_reg_weight * torch.stack(norms).mean()


def update_budget(model: nn.Module, step: int) -> None:
    """Update the importance of all ranks and switch off the least important ones, as the schedule wants at ``step``.

    To be called after each optimiser step (``step`` is the number of steps done), before the gradients are cleared.
    """
    tuner = _adapted(model).base_model
    if tuner.rankallocator.init_bgt > tuner.rankallocator.target_bgt:
        tuner.update_and_allocate(step)


def adalora_state(model: nn.Module) -> dict[str, Any]:
    """Importance scores and rank pattern: what decides about ranks, beside the weights; plain tensors and lists."""
    tuner = _adapted(model).base_model
    state: dict[str, Any] = {name: dict(getattr(tuner.rankallocator, name)) for name in TENSORS}
    state["rank_pattern"] = tuner.peft_config["default"].rank_pattern
    return state


def load_adalora_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Continue from `adalora_state`."""
    tuner = _adapted(model).base_model
    device = next(model.parameters()).device
    for name in TENSORS:
        setattr(tuner.rankallocator, name, {key: value.to(device) for key, value in state[name].items()})
    tuner.peft_config["default"].rank_pattern = state["rank_pattern"]


def _adapted(model: nn.Module) -> PeftModel:
    return getattr(model, "module", model)  # DDP's wrapper


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
