"""What the optimiser is told: the recipe's settings, parameter groups of LoRA+ and of phases, the pull of L2-SP."""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from rayft.config.recipe import Recipe
from rayft.models.partial import ever_trained


def optimizer_settings(recipe: Recipe) -> dict[str, Any]:
    """Optimiser and schedule of a recipe as fields of ``transformers.TrainingArguments``."""
    train = recipe.train
    return {
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_scheduler_kwargs": train.lr_scheduler_kwargs or None,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": train.optim,
        "optim_args": train.optim_args,
    }


def optimizer_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]] | None:
    """Parameter groups for the optimiser where the Trainer's own would be wrong, else None.

    LoRA+ (arXiv 2402.12354): B learns ``loraplus_lr_ratio`` times as fast as A; the groups are PEFT's. Phases: all
    weights of all phases are in the optimiser from the start, those that are frozen have no gradient and are skipped.
    """
    model = getattr(model, "module", model)  # DDP's wrapper
    rate, decay = recipe.train.learning_rate, recipe.train.weight_decay
    if recipe.adapter is not None and recipe.adapter.loraplus_lr_ratio is not None:
        ratio = recipe.adapter.loraplus_lr_ratio
        catch = create_loraplus_optimizer(model, _Groups, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay)
        return [group for group in catch.groups if group["params"]]
    if isinstance(recipe.train.trainable, list):
        names = ever_trained(model, recipe.train.trainable)
        parameters = [parameter for name, parameter in model.named_parameters() if name in names]
        matrices = {"params": [p for p in parameters if p.ndim > 1], "lr": rate, "weight_decay": decay}
        vectors = {"params": [p for p in parameters if p.ndim <= 1], "lr": rate, "weight_decay": 0.0}
        return [group for group in (matrices, vectors) if group["params"]]
    return None


class _Groups:
    """Stands in for an optimiser class, to take the groups that PEFT makes for it."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.groups = groups


class StartWeights:
    """L2-SP (arXiv 1802.01483, equation 3): the weights before training, in host memory, and the pull towards them."""

    def __init__(self, model: nn.Module) -> None:
        self.start = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}

    def penalty(self, model: nn.Module, strength: float) -> torch.Tensor:
        """``strength / 2 * sum((w - w0)^2)``, fp32 scalar with gradient, to be added once to the loss of a step."""
        parameters = dict(getattr(model, "module", model).named_parameters())
        pulls = [_SquaredDistance.apply(parameters[name], start) for name, start in self.start.items()]
        return 0.5 * strength * torch.stack(pulls).sum()

    def add_gradient(self, model: nn.Module, strength: float) -> None:
        """Add the penalty's gradient ``strength * (w - w0)`` to gradients that are there, unscaled and summed."""
        for name, parameter in getattr(model, "module", model).named_parameters():
            if parameter.grad is not None and name in self.start:
                parameter.grad.add_(parameter.detach() - self.start[name].to(parameter.device), alpha=strength)


class _SquaredDistance(torch.autograd.Function):
    """``sum((w - w0)^2)`` that keeps no difference for the backward pass: w0 crosses over from host memory twice."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, start)
        return (weight - start.to(weight.device)).float().pow(2).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight, start = ctx.saved_tensors
        return 2 * gradients[0] * (weight - start.to(weight.device)), None
