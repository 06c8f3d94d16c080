"""One adapter in training: its data, its optimiser, its schedule, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.data.micro_batches import MicroBatches, micro_batch_size
from rayft.data.schedule import StepSchedule
from rayft.models.optimizer import optimizer_settings


class Trial:
    """An adapter of a pack with everything that is its own. The `Pack` makes it, moves it and takes it out.

    step: optimiser steps done. micro: micro-batches of the current step that are in the gradients already; in_company:
    whether one of them went through the model beside other trials.
    """

    def __init__(
        self,
        name: str,
        slot: int,
        recipe: Recipe,
        data: Prepared,
        parameters: dict[str, torch.Tensor],
        *,
        device: str,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        self.name, self.slot, self.recipe, self.parameters = name, slot, recipe, parameters
        examples = data.split("train")
        assert examples is not None
        self.examples, self.validation = examples, data.split("validation")
        self.schedule = StepSchedule.of(recipe, self.examples)
        self.micro_batch_size = micro_batch_size(recipe.train.micro_batch_size, self.schedule, workers, device)
        self.batches = MicroBatches(self.schedule, workers, rank, self.micro_batch_size)
        self.optimizer, self.scheduler = _optimizer(recipe, parameters, self.schedule.total_steps, device)
        self.adjust: Callable[[dict[str, torch.Tensor]], None] | None = None
        """Changes the gradients of a complete step before they are clipped."""
        self.step = 0
        self.restart_step()

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def tokens(self) -> int:
        """Real tokens of all optimiser steps done."""
        return self.schedule.tokens_before(self.step)

    def micro_batch(self) -> list[int]:
        """Indices of the examples that go through the next pass."""
        return self.batches.of_step(self.step)[self.micro]

    @property
    def draw(self) -> int:
        """What dropout masks are drawn for: the number of the micro-batch in the whole run."""
        return self.step * self.batches.micro_steps + self.micro

    @property
    def complete(self) -> bool:
        """Whether the gradients hold all micro-batches of the step."""
        return self.micro == self.batches.micro_steps

    def restart_step(self) -> None:
        """Forget the gradients of a step that is not complete."""
        self.optimizer.zero_grad(set_to_none=True)
        self.micro, self.loss, self.in_company = 0, 0.0, False

    def gradient_norm(self) -> float:
        """L2 norm over all gradients, which are clipped to ``train.max_grad_norm`` when that is not 0."""
        if self.adjust is not None:
            self.adjust(self.parameters)
        most = self.recipe.train.max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), most))

    def update(self) -> float:
        """One optimiser step with the gradients as they are. Returns the learning rate it was done with."""
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.restart_step()
        return rate

    def state(self) -> dict[str, Any]:
        """Everything that going on later needs, as tensors in host memory and plain values. A step that is not complete
        is left out, and done again."""
        return {
            "step": self.step,
            "weights": {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()},
            "optimizer": _to_host(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Raises ValueError when it belongs to an adapter of another shape."""
        different = sorted(state["weights"].keys() ^ self.parameters.keys())
        if different:
            raise ValueError(f"the state holds other weights than the recipe trains: {', '.join(different[:3])}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        self.restart_step()


def _optimizer(recipe: Recipe, parameters: dict[str, torch.Tensor], steps: int, device: str) -> tuple[Any, Any]:
    """The optimiser and schedule that the Trainer would make for these parameters."""
    settings = optimizer_settings(recipe) | recipe.train.trainer_args
    arguments = TrainingArguments(output_dir="unused", use_cpu=device == "cpu", report_to=[], **settings)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(_groups(recipe, parameters), **options)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    return optimizer, scheduler


def _groups(recipe: Recipe, parameters: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One group, or with LoRA+ (arXiv 2402.12354) one for A and one for B, which learns faster."""
    assert recipe.adapter is not None and recipe.train.learning_rate is not None
    rate, decay, ratio = recipe.train.learning_rate, recipe.train.weight_decay, recipe.adapter.loraplus_lr_ratio
    if ratio is None:
        return [{"params": list(parameters.values()), "weight_decay": decay}]
    return [
        {"params": [p for name, p in parameters.items() if letter in name], "lr": rate * factor, "weight_decay": decay}
        for letter, factor in ((".lora_A.", 1.0), (".lora_B.", ratio))
    ]


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_to_host(inner) for inner in value]
    return value
