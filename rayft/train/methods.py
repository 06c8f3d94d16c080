"""What some methods need while training: AdaLoRA's budget, phases of unfreezing, the pull towards the start weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rayft.config.recipe import Recipe
from rayft.models import adapters


class MethodCallback(TrainerCallback):
    """One per worker; does nothing for methods that need nothing."""

    def __init__(self, model: nn.Module, recipe: Recipe, total_steps: int) -> None:
        self.model, self.recipe, self.total_steps = model, recipe, total_steps
        self.adalora = recipe.adapter is not None and recipe.adapter.method == "adalora"
        self.phases = recipe.train.trainable if isinstance(recipe.train.trainable, list) else None
        if self.phases is not None:
            adapters.thaw(model, self.phases)  # until the first step begins
        self.start_weights = adapters.StartWeights(model) if recipe.train.l2_sp else None

    def penalty(self) -> torch.Tensor | None:
        """Scalar that is added to the global loss of a step, or None."""
        if self.adalora:
            return adapters.orthogonal_penalty(self.model)
        if self.start_weights is not None:
            return self.start_weights.penalty(self.model, self.recipe.train.l2_sp)
        return None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.phases is not None:
            adapters.apply_phase(self.model, adapters.phase_at(self.phases, state.global_step, self.total_steps))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.adalora:  # after the optimiser's step, while the gradients it is based on are still there
            adapters.update_budget(self.model, state.global_step)
