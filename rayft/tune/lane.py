"""The loop of a lane: one pack that always has as many trials as it holds, until the study has none left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.errors import UsageError
from rayft.train.watch import Limits, Watch
from rayft.train.worker import out_of_memory
from rayft.tune.capacity import Capacity
from rayft.tune.record import Proposal
from rayft.tune.study import Ended

if TYPE_CHECKING:
    from rayft.multilora.pack import Pack, StepReport
    from rayft.multilora.trial import Trial

POLL_SECONDS = 2.0
"""Between two questions whether the sweep is to stop."""


class Files(Protocol):
    """Where the trials of a run are kept."""

    def save(self, number: int, state: dict[str, Any]) -> str:
        """Keep a checkpoint, in the place of the former one; returns its path."""
        ...

    def load(self, path: str) -> dict[str, Any]: ...

    def forget(self, number: int) -> None:
        """The checkpoint is not needed any more."""
        ...

    def adapter(self, number: int) -> AbstractContextManager[Path]:
        """A folder that becomes the trial's adapter when the block has ended."""
        ...


@dataclass(frozen=True)
class Need:
    """Bytes: of the trial alone, base included, and what it adds to a pack."""

    alone: int
    added: int


@dataclass
class Held:
    """A trial in the pack."""

    number: int
    recipe: Recipe
    data: Prepared
    trial: Trial
    watch: Watch
    need: Need
    losses: list[float] = field(default_factory=list)
    """Since the last evaluation."""
    began: float = field(default_factory=time.monotonic)
    tokens_before: int = 0
    """Trained when it came into this pack."""

    @property
    def name(self) -> str:
        return str(self.number)

    def evaluates(self) -> bool:
        """At `train.eval_steps`, by default once per epoch."""
        schedule = self.trial.schedule
        return self.trial.step % schedule.every(self.recipe.train.eval_steps, schedule.steps_per_epoch) == 0

    def saves(self) -> bool:
        """At `train.save_steps`, by default ten times."""
        schedule = self.trial.schedule
        return self.trial.step % schedule.every(self.recipe.train.save_steps, schedule.total_steps // 10) == 0

    def tokens_per_second(self) -> float:
        return (self.trial.tokens - self.tokens_before) / max(1e-9, time.monotonic() - self.began)


class Lane:
    """Fills a pack from the study, steps it, and reports, checkpoints and ends each trial."""

    def __init__(
        self,
        name: str,
        study: Any,
        pack: Pack,
        files: Files,
        capacity: Capacity,
        *,
        data_of: Callable[[Recipe], Prepared],
        need_of: Callable[[Recipe, Prepared], Need],
        memory: float = math.inf,
        init_from: str | None = None,
    ) -> None:
        """study: a `Study`, or its actor's stand-in. data_of: renders a recipe's data. need_of: estimates memory.
        memory: bytes that trials may add to the base. init_from: folder of the adapter that all trials continue."""
        self.name, self.study, self.pack, self.files, self.capacity = name, study, pack, files, capacity
        self.data_of, self.need_of, self.memory, self.init_from = data_of, need_of, memory, init_from
        self.held: dict[int, Held] = {}
        self.tokens, self.seconds = 0, 0.0  # trained, and spent in steps: evaluations and checkpoints are left out
        self._milestones = {math.ceil(age) for age in study.milestones()}
        self._more = True
        self._polled = time.monotonic()

    def run(self) -> None:
        """Until the study has nothing left, or is asked to stop: then every trial is saved and given back."""
        while True:
            self._fill()
            if not self.held:
                return
            self._pass()
            if time.monotonic() - self._polled > POLL_SECONDS:
                self._polled = time.monotonic()
                if self.study.stopping():
                    self._put_down(list(self.held.values()))
                    return

    # Trials come and go

    def _fill(self) -> None:
        while self._more and len(self.held) < self.capacity.size and self._has_memory():
            proposal = self.study.next(self.name)
            if proposal is None:
                self._more = False  # until a trial here ends: others may have been lost elsewhere by then
            else:
                self._begin(proposal)

    def _has_memory(self) -> bool:
        """Whether another trial like the largest one here fits."""
        added = [held.need.added for held in self.held.values()]
        return not added or sum(added) + max(added) <= self.memory

    def _begin(self, proposal: Proposal) -> None:
        number, recipe = proposal.number, proposal.recipe
        try:
            data = self.data_of(recipe)
            state = self.files.load(proposal.checkpoint) if proposal.checkpoint else None
            trial = self.pack.join(
                str(number), recipe, data, state["pack"] if state else None, init_from=self.init_from
            )
        except UsageError as error:
            self.study.finish(number, "failed", {}, {"reason": f"{error.id}: {error.message}"})
            return
        watch = Watch(Limits.for_run(trial.total_steps), recipe.train.max_grad_norm)
        held = Held(number, recipe, data, trial, watch, self.need_of(recipe, data), tokens_before=trial.tokens)
        if state:
            watch.load(state["watch"])
            held.losses = list(state["losses"])
        self.held[number] = held
        self.study.begun(number, trial.total_steps, trainable_parameters=trial.trainable_parameters)

    def _end(self, held: Held, state: Ended, reason: str = "") -> None:
        """The last word about a trial: its adapter is saved before the study counts it."""
        if state != "failed":
            with self.files.adapter(held.number) as folder:
                self.pack.save(held.name, folder)
        facts = {
            "tokens_per_second": round(held.tokens_per_second(), 2),
            "peak_memory_gb": round(held.need.alone / 1e9, 3),
            **({"reason": reason} if reason else {}),
        }
        self.study.finish(held.number, state, {}, facts)
        self.pack.leave(held.name)
        self.files.forget(held.number)
        del self.held[held.number]
        self._more = True

    def _put_down(self, trials: Sequence[Held]) -> None:
        """Save trials where they are and give them back."""
        for held in trials:
            self._checkpoint(held)
            self.pack.leave(held.name)
            self.study.give_back(held.number)
            del self.held[held.number]

    def _checkpoint(self, held: Held) -> None:
        state = {"pack": self.pack.state(held.name), "watch": held.watch.state(), "losses": held.losses}
        self.study.checkpointed(held.number, self.files.save(held.number, state), held.trial.step)

    # Steps

    def _pass(self) -> None:
        began, count = time.monotonic(), len(self.held)
        try:
            reports = self.pack.step()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._make_room(error)
            return
        seconds = time.monotonic() - began
        steps = {number: sum(report.trial == str(number) for report in reports) for number in self.held}
        tokens = sum(report.tokens for report in reports)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.capacity.measure(count, steps, tokens, seconds)
        for report in reports:
            self._read(self.held[int(report.trial)], report)

    def _make_room(self, error: Exception) -> None:
        """Half of the trials, those that came last, wait until there is room. One alone gets a smaller micro-batch,
        which changes none of its numbers, and has failed when it cannot."""
        trials = list(self.held.values())
        kept = len(trials) // 2
        if kept:
            self._put_down(trials[kept:])
            self.capacity.limit(kept)
            self._more = True
            self.study.event(f"{self.name}: out of memory with {len(trials)} adapters, going on with {kept}")
            return
        (held,) = trials
        micro = held.trial.micro_batch_size // 2
        if not micro:
            self._end(held, "failed", f"out of memory with one example per pass: {str(error).splitlines()[0][:200]}")
            return
        train = held.recipe.train.model_copy(update={"micro_batch_size": micro})
        held.recipe = held.recipe.model_copy(update={"train": train})
        state = self.pack.leave(held.name)
        held.trial = self.pack.join(held.name, held.recipe, held.data, state, init_from=self.init_from)
        self.study.event(f"{self.name}: out of memory with trial {held.number} alone, {micro} examples per pass now")

    def _read(self, held: Held, report: StepReport) -> None:
        if report.diverged:
            self._end(held, "failed", report.diverged)
            return
        held.losses.append(report.loss)
        verdict = held.watch.update(report.step, report.loss, report.grad_norm, report.learning_rate)
        if verdict.diverged and held.recipe.train.on_divergence != "warn":
            self._end(held, "pruned", verdict.evidence)
        elif held.evaluates() or held.trial.finished or held.trial.step in self._milestones:
            self._evaluate(held)
        elif held.saves():
            self._checkpoint(held)

    def _evaluate(self, held: Held) -> None:
        metrics = {**self.pack.evaluate(held.name), "loss": fmean(held.losses), "tokens": float(held.trial.tokens)}
        held.losses.clear()
        verdict = self.study.report(held.number, held.trial.step, metrics)
        if held.trial.finished:
            self._end(held, "complete")
        elif verdict == "stop":
            self._end(held, "pruned")
        else:
            self._checkpoint(held)
