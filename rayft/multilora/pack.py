"""A pack: several adapters trained on one frozen base, in one forward and one backward pass.

Each adapter has its own data order, batch size, optimiser, schedule, clipping, dropout and loss normaliser, so its
curve is the one that `rayft train` gives it alone, whoever shares the pack.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.data.collate import collate
from rayft.data.examples import Examples
from rayft.data.micro_batches import validation_batches
from rayft.errors import UsageError
from rayft.metrics.loss import perplexity
from rayft.models import hub, load
from rayft.models.save import save_plain
from rayft.multilora.bank import AdapterState, Bank
from rayft.multilora.linear import attach
from rayft.multilora.route import Route
from rayft.multilora.start import initial
from rayft.multilora.suits import differs, why_not
from rayft.multilora.trial import Trial
from rayft.objectives import causal


@dataclass(frozen=True)
class StepReport:
    """One optimiser step of one adapter. diverged: why its loss or gradient is not finite; then nothing was updated."""

    trial: str
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    diverged: str = ""


class Pack:
    """The base model and the trials that train adapters on it.

    With ``workers`` > 1, one such pack per process of the default process group trains the same trials together: each
    takes its share of every step's examples, and the gradients of a step are added up in one collective.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        """model, tokenizer: from `rayft.models.load`, for ``recipe``, which says what all trials have in common.
        device: "cpu" or "gpu"."""
        self.model, self.tokenizer, self.recipe, self.device = model, tokenizer, recipe, device
        self.rank, self.workers = rank, workers
        self.dtype = load.dtype_of(recipe, device)
        self.mlora = attach(model)
        self.bank = Bank(self.mlora)
        self.trials: dict[str, Trial] = {}
        causal.install(model, loss_function=causal.own_loss(recipe.train.loss_function))

    @classmethod
    def open(cls, recipe: Recipe, base: str, *, device: str, rank: int = 0, workers: int = 1) -> Pack:
        """Load the base model ``base`` (as `models.hub.fetch` takes it) for a pack of trials like ``recipe``."""
        folder = hub.fetch(base, recipe.model.revision)
        model = load.load_base(
            recipe, folder, device="cpu" if device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        )
        return cls(model, load.load_tokenizer(recipe, folder), recipe, device=device, rank=rank, workers=workers)

    # Who is in the pack

    def join(
        self,
        name: str,
        recipe: Recipe,
        data: Prepared,
        state: dict[str, Any] | None = None,
        *,
        init_from: str | None = None,
    ) -> Trial:
        """Add a trial; it takes part from the next `step` on.

        state: what `leave` or `state` gave, here or in another pack; the trial goes on from there. init_from: folder of
        the adapter to continue (`adapter.init_from`, resolved).

        Raises:
            UsageError: R804, when the recipe cannot be trained in this pack; R320 and others of its adapter section.
            ValueError: a name in use, or a state that belongs to another adapter.
        """
        if name in self.trials:
            raise ValueError(f"trial {name} is in this pack already")
        if reason := why_not(recipe) or differs(recipe, self.recipe):
            raise UsageError("R804", f"trial {name} cannot join this pack: {reason}", "rayft train trains it alone")
        trial = self.admit(name, recipe, data, initial(self.model, recipe, self.tokenizer, init_from))
        if state is not None:
            trial.load(state)
        return trial

    def admit(
        self, name: str, recipe: Recipe, data: Prepared, start: AdapterState, trained: Collection[str] | None = None
    ) -> Trial:
        """Add a trial that begins with the adapter ``start``; the caller knows that the recipe suits this pack.

        trained: names of the tensors that are trained; all by default.
        """
        assert recipe.adapter is not None
        slot = self.bank.load(start, trainable=True, dropout=recipe.adapter.dropout, seed=recipe.seed)
        parameters = self.bank.named_parameters(slot)
        for tensor_name, parameter in parameters.items():
            parameter.requires_grad_(trained is None or tensor_name in trained)
        trial = Trial(
            name,
            slot,
            recipe,
            data,
            {tensor_name: parameter for tensor_name, parameter in parameters.items() if parameter.requires_grad},
            device=self.device,
            rank=self.rank,
            workers=self.workers,
        )
        self.trials[name] = trial
        return trial

    def state(self, name: str) -> dict[str, Any]:
        """All that a trial needs to go on later: weights, optimiser, schedule, position. For ``torch.save``."""
        return self.trials[name].state()

    def leave(self, name: str) -> dict[str, Any]:
        """Take a trial out, between two steps, and free what it held. Returns its `state`."""
        state = self.state(name)
        self.bank.unload(self.trials.pop(name).slot)
        return state

    def drop(self, name: str) -> None:
        """Take a trial out without a look at its state."""
        self.bank.unload(self.trials.pop(name).slot)

    def save(self, name: str, folder: str | Path) -> None:
        """Write a trial's adapter for stock PEFT, with its tokenizer."""
        adapter = self.bank.adapter(self.trials[name].slot)
        save_plain(adapter.config, dict(adapter.tensors), folder, self.tokenizer, self.model.origin)

    # Training

    def step(self) -> list[StepReport]:
        """One pass over one micro-batch of every unfinished trial; a report for each that completed an optimiser step.

        A trial whose gradient is not finite in company is tried alone before it counts as diverged: an overflow in one
        adapter's rows can reach the others' gradients as 0 * inf.

        When it raises (out of memory), every trial is as it was after its last optimiser step.
        """
        active = [trial for trial in self.trials.values() if not trial.finished]
        if not active:
            return []
        try:
            self._pass(active)
            complete = [trial for trial in active if trial.complete]
            self._add_up(complete)
            return [self._finish_step(trial) for trial in complete]
        except BaseException:
            for trial in active:
                trial.restart_step()
            raise

    def _pass(self, trials: Sequence[Trial]) -> None:
        """Forward and backward of the next micro-batch of each trial; adds to their gradients and losses."""
        rows = [[trial.examples[index] for index in trial.micro_batch()] for trial in trials]
        lengths = [sum(len(row["input_ids"]) for row in part) for part in rows]
        batch = collate([row for part in rows for row in part], True, self.tokenizer.pad_token_id)
        steps = {trial.slot: trial.draw for trial in trials}
        self.model.train()
        with self.mlora.route(self._route([trial.slot for trial in trials], lengths, steps)):
            sums = self._forward(batch, lengths)
            weights = torch.tensor([trial.schedule.weight(trial.step) for trial in trials], device=sums.device)
            losses = sums / weights
            losses.sum().backward()
        for trial, loss in zip(trials, losses.tolist(), strict=True):
            trial.loss += loss
            trial.micro += 1
            trial.in_company = trial.in_company or len(trials) > 1

    def _finish_step(self, trial: Trial) -> StepReport:
        loss, norm = trial.loss, trial.gradient_norm()
        if not math.isfinite(loss + norm) and trial.in_company:
            self._repeat_alone(trial)
            loss, norm = trial.loss, trial.gradient_norm()
        tokens = trial.schedule.tokens(trial.step)
        if not math.isfinite(loss + norm):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            trial.restart_step()
            return StepReport(trial.name, trial.step, loss, norm, 0.0, tokens, diverged=f"its {what} is not finite")
        rate = trial.update()
        return StepReport(trial.name, trial.step, loss, norm, rate, tokens)

    def _repeat_alone(self, trial: Trial) -> None:
        trial.restart_step()
        while not trial.complete:
            self._pass([trial])
        self._add_up([trial])

    def _add_up(self, trials: Iterable[Trial]) -> None:
        """Sum gradients and losses of complete steps over all workers, in one collective."""
        trials = list(trials)
        if self.workers == 1 or not trials:
            return
        gradients = [p.grad for trial in trials for p in trial.parameters.values() if p.grad is not None]
        losses = torch.tensor([trial.loss for trial in trials], device=gradients[0].device)
        flat = torch.cat([losses, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        for trial, loss in zip(trials, flat.tolist()[: len(trials)], strict=True):
            trial.loss = loss
        parts = flat[len(trials) :].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    # Evaluation

    def evaluate(self, name: str) -> dict[str, float]:
        """``validation_loss`` and ``perplexity`` of a trial on its validation split; empty where it has none.

        Sum of weight x token loss over the sum of weights, in fp64, as `rayft train` counts it.
        """
        trial = self.trials[name]
        if trial.validation is None:
            return {}
        loss = self.loss_on(trial.slot, trial.validation, trial.micro_batch_size)
        return {"validation_loss": loss, "perplexity": perplexity(loss)}

    def loss_on(self, slot: int, examples: Examples, micro_batch_size: int) -> float:
        """Loss of the adapter in a slot (-1: of the base) on some examples, counted as in `evaluate`."""
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for batch in validation_batches(
                examples,
                self.workers,
                self.rank,
                micro_batch_size,
                padding_free=True,
                pad_token_id=self.tokenizer.pad_token_id,
            ):
                lengths = [batch["input_ids"].shape[1]]
                with self.mlora.route(self._route([slot], lengths, {})):
                    sums[0] += self._forward(batch, lengths).double().cpu()[0]
                sums[1] += batch["loss_weights"].double().sum()
        if self.workers > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    # The model

    def _route(self, slots: Sequence[int], lengths: Sequence[int], steps: dict[int, int]) -> Route:
        owners = torch.repeat_interleave(torch.tensor(slots, dtype=torch.int32), torch.tensor(lengths))
        return Route(owners.to(self.model.device), step=steps)

    def _forward(self, batch: dict[str, torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Sums of weight x token loss, float32 [parts], one per part of the row."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with load.compute_context(self.dtype, self.device):
            return self.model(**inputs, segments=list(lengths)).loss
