"""Population-based training: decisions are those of Ray's own scheduler in Ray's own controller, and weights move."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from rayft.config.tune import Tune
from rayft.errors import UsageError
from rayft.runs.folder import RunFolder
from rayft.tune import search
from rayft.tune.population import Population, mutations
from rayft.tune.record import Exploit
from rayft.tune.schedulers import seeded
from tests.train.conftest import Recipes
from tests.tune.test_study import trials_of

SPACE: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "adapter.dropout": {"choice": [0.0, 0.05, 0.1]},
    "adapter.rank": {"choice": [2, 4]},
}


def settings(**changes: Any) -> Tune:
    arguments = {"perturbation_interval": 5} | changes
    return Tune.model_validate({"space": SPACE, "scheduler": "pbt", "num_samples": 6, "scheduler_args": arguments})


def start(seed: int) -> dict[int, dict[str, Any]]:
    draw = random.Random(seed)
    return {
        n: {
            "train.learning_rate": 10 ** draw.uniform(-4, -2),
            "adapter.dropout": draw.choice([0.0, 0.05, 0.1]),
            "adapter.rank": draw.choice([2, 4]),
        }
        for n in range(6)
    }


@pytest.mark.parametrize("seed", range(3))
def test_decisions_are_those_of_rays_own_scheduler(seed: int) -> None:
    """Ray's, with its public arguments, sees the same reports of six trials that run side by side."""
    values = start(seed)
    tune = settings()
    ours = Population(tune, tune.space, 40, seed)
    theirs = PopulationBasedTraining(
        time_attr="age",
        metric="loss",
        mode="min",
        perturbation_interval=5,
        hyperparam_mutations={
            "train.learning_rate": ray_tune.loguniform(1e-4, 1e-2),
            "adapter.dropout": [0.0, 0.05, 0.1],
        },
        custom_explore_fn=lambda config: (
            config | {"train.learning_rate": min(max(config["train.learning_rate"], 1e-4), 1e-2)}
        ),
        log_config=False,
    )
    controller = StandIn()
    for number, point in values.items():
        ours.add(number, point)
        ours.running(number)
        trial = Trial("peer", trial_id=f"peer{number}", config=dict(point), stub=True)
        trial.set_status(Trial.RUNNING)
        controller.trials.append(trial)
        theirs.on_trial_add(controller, trial)
    looks, taken = 0, 0
    noise = random.Random(seed)
    for step in range(5, 40, 5):
        for number, trial in enumerate(controller.trials):
            loss = noise.uniform(0, 1) + abs(np.log10(trial.config["train.learning_rate"]) + 3)
            found = ours.decide(number, {"validation_loss": loss, "step": step, "total_steps": 40})
            looks += 1
            controller.left = None
            with seeded(seed, looks):
                theirs.on_trial_result(controller, trial, {"loss": loss, "age": step})
            assert isinstance(found, Exploit) == (controller.left is trial)
            if isinstance(found, Exploit):
                assert found.values == trial.config
                taken += 1
    assert taken > 3


class StandIn:
    """Of Ray's TuneController, which would run the trials: it saves when asked, and notes who has left."""

    search_alg = None

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.left: Trial | None = None

    def get_trials(self) -> list[Trial]:
        return self.trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        self.left = trial

    def _schedule_trial_save(self, trial: Trial, result: Any) -> str:
        return "saved"


def test_a_strong_trial_is_cloned_with_values_inside_the_space() -> None:
    tune = settings(quantile_fraction=0.5, perturbation_factors=[100.0, 0.001])
    population = Population(tune, tune.space, 100, 0)
    for number, rate in enumerate((1e-4, 1e-2)):
        population.add(number, {"train.learning_rate": rate, "adapter.dropout": 0.0, "adapter.rank": 2 + 2 * number})
        population.running(number)
    assert population.decide(0, {"validation_loss": 2.0, "step": 5, "total_steps": 100}) == "continue", "alone"
    assert population.decide(1, {"validation_loss": 1.0, "step": 10, "total_steps": 100}) == "continue", "the best"
    found = population.decide(0, {"validation_loss": 2.0, "step": 12, "total_steps": 100})
    assert isinstance(found, Exploit) and (found.donor, found.step) == (1, 10)
    assert found.values["adapter.rank"] == 4, "what cannot change during a run comes along with the weights"
    assert 1e-4 <= found.values["train.learning_rate"] <= 1e-2


def test_a_trial_leaves_for_one_that_waits() -> None:
    tune = settings()
    population = Population(tune, tune.space, 100, 0)
    for number, values in list(start(0).items())[:2]:
        population.add(number, values)
    population.running(0)
    assert population.decide(0, {"validation_loss": 1.0, "step": 4, "total_steps": 100}) == "continue", "not yet"
    assert population.decide(0, {"validation_loss": 1.0, "step": 5, "total_steps": 100}) == "leave"
    assert population.decide(0, {"validation_loss": 1.0, "step": 100, "total_steps": 100}) == "continue", "its end"


def test_a_space_needs_something_that_may_change() -> None:
    tune = Tune.model_validate({"space": {"adapter.rank": {"choice": [2, 4]}}})
    with pytest.raises(UsageError, match="none that can change there") as refused:
        mutations(tune.space)
    assert refused.value.id == "R725"


@pytest.mark.long
def test_a_population_in_one_process(recipe: Recipes) -> None:
    """Two trials take turns in one lane. The one that could not learn goes on with the weights of the other."""
    space = {"train.learning_rate": {"loguniform": [1e-7, 1e-2]}, "adapter.rank": {"choice": [2, 4]}}
    points = [{"train.learning_rate": 1e-7, "adapter.rank": 2}, {"train.learning_rate": 2e-3, "adapter.rank": 4}]
    arguments = {"perturbation_interval": 60, "quantile_fraction": 0.5, "resample_probability": 0.0}
    tune = {"space": space, "points_to_evaluate": points, "num_samples": 2, "scheduler_args": arguments}
    steps = {"train.max_steps": 200, "data.validation": 0.25, "train.lr_scheduler_type": "constant"}
    result = search(recipe(name="population", tune=tune | {"scheduler": "pbt"}, **steps), quiet=True)
    run = Path(result.path)
    weak, strong = result.rows
    assert [(row.state, row.step) for row in result.rows] == [("complete", 200)] * 2
    assert "taken_over" not in strong.facts and strong.values == points[1]
    told = weak.facts["taken_over"][-1]
    assert told["donor"] == 1 and weak.values == told["values"]
    assert weak.values["adapter.rank"] == 4 and weak.values["train.learning_rate"] > 1e-3
    assert weak.history[0] == strong.history[0], "its curve is that of the weights that it has"

    trial = RunFolder.open(run / "trials" / "0")
    assert trial.record.parent == f"{run}/trials/1@step-{told['step']}"
    rows = trial.metrics()
    assert rows[0]["step"] > told["step"], "it went on from there"
    assert rows[-1]["learning_rate"] == pytest.approx(told["values"]["train.learning_rate"]), "with its own rate"
    assert not any((run / "trials" / str(number) / "checkpoints").exists() for number in range(2))
    assert "trial 0 went on from trial 1 at step" in (run / "report.md").read_text()
    assert "schedule" in (run / "best.yaml").read_text() or result.best == 1
    assert [trial.state.name for trial in trials_of(run, "population")] == ["COMPLETE"] * 2
    assert len(result.result_grid) == 2
