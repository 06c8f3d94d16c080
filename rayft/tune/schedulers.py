"""Early stopping by Ray Tune's own schedulers. They see stand-ins for Tune's trials, so a trial can live in a pack."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from rayft.config.tune import Mode, Tune
from rayft.tune.record import Exploit, Verdict
from rayft.tune.space import Space, Values

if TYPE_CHECKING:
    from rayft.tune.population import Population

HYPERBAND_BRACKETS = 3


class Rungs:
    """Asked after every evaluation whether a trial is stopped.

    budget: age (in `scheduler_args.time_attr`) at which a trial has run to its end, where `max_t` does not say it.
    The same reports in the same order give the same decisions, so a resumed study replays what it has recorded.
    """

    waits_for_all = False
    """Whether all trials begin before one of them goes on."""

    def __init__(self, tune: Tune, budget: float, seed: int) -> None:
        arguments = tune.scheduler_args
        self.time_attr = arguments.time_attr
        self.max_t = arguments.max_t or budget
        self.factor = arguments.reduction_factor
        self.grace_period = arguments.grace_period or max(1.0, self.max_t / self.factor**2)
        self.name = "none" if len(tune.objectives) > 1 else tune.scheduler
        self._metric, mode = tune.objectives[0]
        self._seed = seed
        self._trials: dict[int, Trial] = {}
        self.scheduler = self._scheduler(tune, mode)

    def milestones(self) -> list[float]:
        """Ages at which a trial may be stopped, in order."""
        if self.name not in ("asha", "hyperband"):
            return []
        count = math.floor(math.log(self.max_t / self.grace_period) / math.log(self.factor) + 1e-9) + 1
        return [self.grace_period * self.factor**k for k in range(count)]

    def add(self, number: int, values: Values | None = None) -> None:
        trial = self._trials[number] = Trial("rayft", trial_id=str(number), stub=True)
        with seeded(self._seed, number):  # of several brackets Ray draws one
            self.scheduler.on_trial_add(_CONTROLLER, trial)

    def running(self, number: int) -> None: ...

    def waiting(self, number: int) -> None: ...

    def decide(self, number: int, result: Mapping[str, Any]) -> Verdict | Exploit:
        return "stop" if self.stops(number, result) else "continue"

    def stops(self, number: int, result: Mapping[str, Any]) -> bool:
        """Whether the trial is to end now. `result` holds the metric and the age."""
        decision = self.scheduler.on_trial_result(_CONTROLLER, self._trials[number], dict(result))
        return bool(decision == TrialScheduler.STOP)

    def ended(self, number: int, result: Mapping[str, Any] | None) -> None:
        """The trial has ended with this last result; None takes it out without one."""
        trial = self._trials.pop(number)
        if result is not None:
            self.scheduler.on_trial_complete(_CONTROLLER, trial, dict(result))
        else:
            self.scheduler.on_trial_remove(_CONTROLLER, trial)

    def has_full_budget(self, age: float) -> bool:
        """Whether a trial that is stopped at this age has come to its end, and was not cut short."""
        return self.name != "none" and age >= self.max_t

    def _scheduler(self, tune: Tune, mode: Mode) -> Any:
        common = {"time_attr": self.time_attr, "metric": self._metric, "mode": mode}
        if self.name in ("asha", "hyperband"):
            brackets = tune.scheduler_args.brackets or (1 if self.name == "asha" else HYPERBAND_BRACKETS)
            return AsyncHyperBandScheduler(
                **common,
                max_t=self.max_t,
                grace_period=self.grace_period,
                reduction_factor=self.factor,
                brackets=brackets,
            )
        if self.name == "median":
            least = tune.scheduler_args.min_samples_required
            return MedianStoppingRule(**common, grace_period=self.grace_period, min_samples_required=least)
        return FIFOScheduler()


def scheduler_of(tune: Tune, space: Space, budget: float, seed: int) -> Rungs | Population:
    """What decides after each evaluation; budget: age of a trial at its end."""
    if tune.scheduler != "pbt":
        return Rungs(tune, budget, seed)
    from rayft.tune.population import Population

    return Population(tune, space.distributions, budget, seed)


class _Controller:
    """What the median rule asks of Tune's controller: whether somebody waits for the trial's place. Nobody does."""

    @staticmethod
    def get_live_trials() -> list[Trial]:
        return []


_CONTROLLER: Any = _Controller()


@contextmanager
def seeded(seed: int, number: int) -> Iterator[None]:
    """Ray draws with the global generators; afterwards they are as before."""
    former: list[tuple[Callable[[Any], None], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    words = np.random.SeedSequence([seed, number]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words)
    try:
        yield
    finally:
        for restore, state in former:
            restore(state)
