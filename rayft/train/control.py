"""The Trainer callback that joins the loop with the cluster: rows, checkpoints, stop flag, preemption, divergence."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rayft.config.recipe import Recipe
from rayft.data.micro_batches import MicroBatches
from rayft.metrics import perplexity
from rayft.runs import checkpoints, manifest
from rayft.train.checkpoint import FACTS
from rayft.train.context import Context
from rayft.train.speed import Speed
from rayft.train.watch import Watch

PREEMPTION_POLL_SECONDS = 5.0
"""Ray polls the nodes as often; asking is a barrier, so not at every step."""
NOT_EVALUATED = -sys.float_info.max
"""Score of a checkpoint without a validation loss: below every other. Not -inf, which Ray's snapshot of a run would
keep as null, and stumble over when the run goes on."""


class Diverged(Exception):
    """The watch gave its verdict and `train.on_divergence` is not warn. `since`: the first step that looked bad."""

    def __init__(self, step: int, since: int, kind: str, evidence: str) -> None:
        super().__init__(step, since, kind, evidence)
        self.step, self.since, self.kind, self.evidence = step, since, kind, evidence


class ClusterCallback(TrainerCallback):
    """One per worker. Decisions that end or save a run are taken together: every rank sees the same step."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        context: Context,
        batches: MicroBatches,
        watch: Watch,
        speed: Speed,
        attempt: int,
        answer: Callable[[], dict[str, Any]] | None,
    ) -> None:
        """answer: generates on the validation prompts (all ranks call it): {"scalars": {...}, "samples": [...]}."""
        self.recipe, self.context, self.batches, self.schedule = recipe, context, batches, batches.schedule
        self.watch, self.speed, self.attempt, self.answer = watch, speed, attempt, answer
        self.stopped = False
        self.without_gain = 0
        self._preemption_saved = False
        self._polled = time.monotonic()
        self._tokens: tuple[int, int] | None = None
        self._validation_loss: float | None = None
        self._evaluated_at = -1

    def load(self, facts: dict[str, Any]) -> None:
        """Continue from the facts of a checkpoint (`checkpoint.FACTS`)."""
        self.watch.load(facts["watch"])
        self.speed.load(facts["speed"])
        self.without_gain = facts["without_gain"]

    # While training

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        self.speed.step(
            tokens=self.schedule.tokens(step - 1),
            supervised=round(self.schedule.weight(step - 1)),
            padding=0 if self.recipe.data.padding_free else self.batches.padding(step - 1),
        )
        with self.speed.report():
            stop, poll = self._agree()
        if stop:
            self.stopped = True
            control.should_training_stop = control.should_save = True
        if poll and not self._preemption_saved and self.context.preempted():
            self._preemption_saved = True
            control.should_save = True
            self._event("preemption", step=step)
        if step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        return control

    def on_train_log(self, step: int, logs: dict[str, float]) -> None:
        """A row of training scalars (Trainer's own names). Raises Diverged on every rank alike."""
        loss, grad_norm = logs["loss"], logs.get("grad_norm")
        verdict = self.watch.update(step, loss, grad_norm, logs.get("learning_rate"))
        if self.context.rank == 0:
            row = self.speed.scalars() | self.watch.statistics()
            row |= {name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            # Counts come from the plan: they are the same after a resume, and those of the whole cluster.
            row |= {"step": step, "epoch": step / self.schedule.steps_per_epoch, "tokens": self._tokens_after(step)}
            self.context.recording.tell("log", {"kind": "train", **row})
        if verdict.kind == "none":
            return
        self._event(
            "divergence" if verdict.diverged else "warning", step=step, kind_of=verdict.kind, evidence=verdict.evidence
        )
        if verdict.diverged and self.recipe.train.on_divergence != "warn":
            since = step if verdict.kind == "nan" else step - self.watch.limits.patience
            raise Diverged(step, since, verdict.kind, verdict.evidence)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> TrainerControl:
        loss = metrics["eval_loss"]
        best = state.best_metric is None or loss < state.best_metric
        self._validation_loss, self._evaluated_at = loss, state.global_step
        control.should_save = control.should_save or best
        patience = self.recipe.train.early_stopping_patience
        gain = best and (
            state.best_metric is None or state.best_metric - loss > self.recipe.train.early_stopping_threshold
        )
        self.without_gain = 0 if gain else self.without_gain + 1
        if patience is not None and self.without_gain >= patience:
            control.should_training_stop = control.should_save = True
            self._event("early_stopping", step=state.global_step, evaluations=self.without_gain)
        answers = self.answer() if self.answer is not None else {"scalars": {}, "samples": []}
        if self.context.rank == 0:
            row = {"kind": "eval", "step": state.global_step, "validation_loss": loss, "perplexity": perplexity(loss)}
            self.context.recording.tell("log", row | answers["scalars"])
            if answers["samples"]:
                self.context.recording.tell("samples", state.global_step, answers["samples"])
        return control

    # Checkpoints

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        folder = os.path.join(args.output_dir or "", f"checkpoint-{step}")
        os.makedirs(folder, exist_ok=True)
        if self.context.rank == 0:
            self.context.recording.tell("flush")  # a bucket has no checkpoint without the rows before it
            facts = {
                "step": step,
                "attempt": self.attempt,
                "workers": self.context.workers,
                "strategy": self.recipe.scale.strategy,
                "watch": self.watch.state(),
                "speed": self.speed.state(),
                "without_gain": self.without_gain,
            }
            with open(os.path.join(folder, FACTS), "w") as file:
                json.dump(facts, file)
        manifest.write_manifest(folder, step, self.context.rank, self.context.workers)
        metrics = {"step": step, "attempt": self.attempt, "score": self._score(step)}
        if self._evaluated_at == step and self._validation_loss is not None:
            metrics["validation_loss"] = self._validation_loss
        last = control.should_training_stop or step >= state.max_steps
        with self.speed.report():
            self.context.report(metrics, folder, checkpoints.name_of(step, self.attempt), last)
        return control

    def _score(self, step: int) -> float:
        """Ray keeps the checkpoints of the highest score, and the latest: the best ones by validation loss where
        there is one, else the newest."""
        if self.recipe.data.validation is None:
            return float(step)
        loss = self._validation_loss if self._evaluated_at == step else None
        return -loss if loss is not None and math.isfinite(loss) else NOT_EVALUATED

    # Among the workers

    def _agree(self) -> tuple[bool, bool]:
        """(stop, poll for preemption): what rank 0 knows, on every rank at the same step."""
        flags = torch.zeros(2, dtype=torch.int32)
        if self.context.rank == 0:
            flags[0] = int(self.context.recording.ask("should_stop"))
            flags[1] = int(time.monotonic() - self._polled > PREEMPTION_POLL_SECONDS)
        if self.context.workers > 1:
            if dist.get_backend() == "nccl":
                flags = flags.cuda()
            dist.broadcast(flags, src=0)
        stop, poll = (bool(flag) for flag in flags.tolist())
        if poll:
            self._polled = time.monotonic()
        return stop, poll

    def _event(self, kind: str, **facts: Any) -> None:
        if self.context.rank == 0:
            self.context.recording.tell("event", kind, **facts)

    def _tokens_after(self, step: int) -> int:
        """Real tokens of the first `step` steps; the common case adds one step to what is known."""
        known, tokens = self._tokens or (step - 1, self.schedule.tokens_before(step - 1))
        for done in range(known, step):
            tokens += self.schedule.tokens(done)
        self._tokens = (step, tokens)
        return tokens
