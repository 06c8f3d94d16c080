"""Population-based training (arXiv 1711.09846): weak trials go on with the weights of strong ones and other rates.

Ray Tune's own `PopulationBasedTraining` decides; it sees stand-ins for Tune's trials, as in `schedulers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from rayft.config.tune import Distribution, Tune
from rayft.errors import UsageError
from rayft.tune.record import Exploit, Verdict
from rayft.tune.schedulers import seeded
from rayft.tune.space import Values, nearest

MUTABLE = ("train.learning_rate", "train.weight_decay", "train.max_grad_norm", "adapter.dropout")
"""What may change in the middle of a run. Everything else of a strong trial comes along with its weights."""
LOOKS = 10
"""Looks at a trial during its budget, where `perturbation_interval` does not say it."""


def interval_of(tune: Tune, steps: float) -> int:
    """Optimiser steps between two looks at a trial of so many steps."""
    return tune.scheduler_args.perturbation_interval or max(1, round(steps / LOOKS))


def mutations(space: Mapping[str, Distribution]) -> dict[str, Any]:
    """What Ray may change, in its own terms: a list of choices, or a domain.

    Raises UsageError R725 where the space has nothing that may change during a run.
    """
    found = {
        path: list(item.values) if item.kind == "choice" else getattr(ray_tune, item.kind)(*item.values)
        for path, item in space.items()
        if path in MUTABLE and not item.when and not (item.kind == "choice" and len(item.values) == 1)
    }
    if not found:
        raise UsageError(
            "R725",
            "tune.scheduler pbt changes values during a run, and tune.space searches none that can change there",
            f"these can, without a condition: {', '.join(MUTABLE)}",
        )
    return found


class Population:
    """A scheduler as `Rungs` is one. The same reports in the same order give the same answers."""

    time_attr = "step"
    waits_for_all = True

    def __init__(self, tune: Tune, space: Mapping[str, Distribution], steps: float, seed: int) -> None:
        """steps: of a trial's full budget."""
        self.budget = steps
        arguments = tune.scheduler_args
        self._metric, mode = tune.objectives[0]
        changing = mutations(space)

        def within(config: dict[str, Any]) -> dict[str, Any]:
            return config | {path: nearest(space[path], config[path]) for path in changing}

        self._seed = seed
        self._looks = 0
        self._trials: dict[int, Trial] = {}
        self._controller: Any = _Controller(self._trials)
        self._scheduler = _Scheduler(
            time_attr="step",
            metric=self._metric,
            mode=mode,
            perturbation_interval=interval_of(tune, steps),
            hyperparam_mutations=changing,
            quantile_fraction=arguments.quantile_fraction,
            resample_probability=arguments.resample_probability,
            perturbation_factors=tuple(arguments.perturbation_factors),
            custom_explore_fn=within,
            log_config=False,
        )

    def add(self, number: int, values: Values) -> None:
        trial = self._trials[number] = Trial("rayft", trial_id=str(number), config=dict(values), stub=True)
        self._scheduler.on_trial_add(self._controller, trial)

    def running(self, number: int) -> None:
        self._trials[number].set_status(Trial.RUNNING)

    def waiting(self, number: int) -> None:
        self._trials[number].set_status(Trial.PAUSED)

    def ended(self, number: int, result: Mapping[str, Any] | None) -> None:
        self._trials[number].set_status(Trial.TERMINATED)

    def decide(self, number: int, result: Mapping[str, Any]) -> Verdict | Exploit:
        """leave: the trial makes room for one that waits."""
        if self._metric not in result or result["step"] >= result["total_steps"]:
            return "continue"
        trial = self._trials[number]
        self._looks += 1
        with seeded(self._seed, self._looks):
            decision = self._scheduler.on_trial_result(self._controller, trial, dict(result))
        found = self._scheduler.exploits.pop(trial, None)
        if found is not None:
            return found
        return "leave" if decision == TrialScheduler.PAUSE else "continue"

    def milestones(self) -> list[float]:
        return []

    def has_full_budget(self, age: float) -> bool:
        return age >= self.budget


class _Scheduler(PopulationBasedTraining):
    """Keeps what it has decided for the trials that take another one over."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.exploits: dict[Trial, Exploit] = {}

    def _exploit(self, tune_controller: Any, trial: Trial, trial_to_clone: Trial) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)
        step = int(self._trial_state[trial_to_clone].last_train_time)
        self.exploits[trial] = Exploit(int(trial_to_clone.trial_id), step, dict(trial.config))


class _Controller:
    """What PBT asks of Tune's controller. Runs save by themselves at every look."""

    search_alg = None

    def __init__(self, trials: Mapping[int, Trial]) -> None:
        self._trials = trials

    def get_trials(self) -> list[Trial]:
        return list(self._trials.values())

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None: ...

    @staticmethod
    def _schedule_trial_save(trial: Trial, result: Mapping[str, Any]) -> str:
        return f"{trial.trial_id}@{result['step']}"
