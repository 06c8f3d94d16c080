"""Hugging Face's Trainer with the step plan, the loss normalisation and the evaluation of rayft."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import PrinterCallback

from rayft.config.recipe import Recipe
from rayft.data.schedule import StepSchedule
from rayft.models import adapters
from rayft.train.speed import Speed

TRAINING_STATE = "weights.pt"
"""Inside a checkpoint of an adapter: its weights exactly as they are trained. The stock files can hold less (the
full ranks of AdaLoRA) or a conversion (PiSSA)."""


class Hears(Protocol):
    """What a trainer tells of its steps: to a clock where time goes, and each row of training scalars."""

    speed: Speed

    def on_train_log(self, step: int, logs: dict[str, float]) -> None: ...


class RayftTrainer(Trainer):
    """The Trainer, except for four things.

    The loader yields our micro-batches in the order of the step plan. The loss of a micro-batch is the sum of weight x
    token loss over the *global* step's sum of weights, which every worker knows from the plan. Evaluation sums over
    all workers and never gathers logits. Checkpoints hold the stock export of the model.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        recipe: Recipe,
        schedule: StepSchedule,
        loader: DataLoader[Any],
        validation: Callable[[], Iterator[dict[str, torch.Tensor]]] | None,
        penalty: Callable[[], torch.Tensor | None],
        control: Hears,
        learning_rate_scale: float = 1.0,
        **arguments: Any,
    ) -> None:
        """validation: a fresh pass over this worker's validation batches. penalty: scalar added to the global loss, or
        None. control: is told each row of training scalars."""
        super().__init__(**arguments)
        self.recipe, self.schedule, self.loader, self.validation = recipe, schedule, loader, validation
        self.penalty, self.cluster, self.learning_rate_scale = penalty, control, learning_rate_scale
        self.remove_callback(PrinterCallback)
        self._peak_rates: list[float] | None = None
        self.model_accepts_loss_kwargs = False  # the loss is ours: nothing of the Trainer's is passed into the model

    # What is fed in

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.loader

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        return len(self.schedule.lengths)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        with self.cluster.speed.data():
            return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # the plan knows it

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Share of this micro-batch in the global step's loss, times the workers, since gradients are averaged."""
        outputs = model(**inputs)
        loss = outputs["loss"] * (self.args.world_size / self.schedule.weight(self.state.global_step))
        penalty = self.penalty()
        if penalty is not None:
            loss = loss + penalty / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    # The optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """LoRA+ has parameter groups of its own; the Trainer makes all others."""
        target = self.model if model is None else model
        groups = adapters.optimizer_groups(target, self.recipe)
        if groups is not None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(groups, **arguments)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if hasattr(scheduler, "base_lrs"):
            self._peak_rates = [rate * self.learning_rate_scale for rate in scheduler.base_lrs]
            self._set_peak_rates(scheduler)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self.optimizer
        decays = [group["weight_decay"] for group in optimizer.param_groups] if optimizer is not None else []
        super()._load_optimizer_and_scheduler(checkpoint)
        self._set_peak_rates(self.lr_scheduler)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=False):
            group["weight_decay"] = decay

    def _set_peak_rates(self, scheduler: Any) -> None:
        """The recipe's peak rates, scaled after a rollback, also where a checkpoint brings others: those of an earlier
        attempt, or of the run that this one has cloned."""
        if self._peak_rates is None or scheduler.base_lrs == self._peak_rates:
            return
        scheduler.base_lrs = list(self._peak_rates)
        scheduler._last_lr = scheduler.get_lr()
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    # Rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training scalars go to the run's recorder; the Trainer's own summary at the end does not."""
        super().log(logs, start_time)
        if "loss" in logs:
            with self.cluster.speed.report():
                self.cluster.on_train_log(self.state.global_step, logs)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss: sum of weight x token loss over the sum of weights, over all workers. fp64 sums."""
        assert self.validation is not None
        with self.cluster.speed.pause():
            metrics = self._validation_loss(self.validation())
            self.control: TrainerControl = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        return metrics

    def _validation_loss(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, float]:
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                sums[0] += model(**inputs)["loss"].double()
                sums[1] += inputs["loss_weights"].double().sum()
        model.train()
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        return {"eval_loss": float(sums[0] / sums[1])}

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Stock adapter or model with its tokenizer; beside an adapter the exact state that a resume needs.

        A model's own files are exact already, and DeepSpeed keeps the weights in its shards.
        """
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir or ""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        kind = adapters.save(model, folder, self.processing_class, state_dict=state_dict)
        if kind == "adapter" and not self.is_deepspeed_enabled:
            torch.save(adapters.training_state(model), os.path.join(folder, TRAINING_STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        exact = os.path.join(resume_from_checkpoint, TRAINING_STATE)
        if os.path.isfile(exact):
            adapters.load_training_state(self.model, torch.load(exact, weights_only=True))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
