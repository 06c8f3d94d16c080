"""From a space to points and recipes, and what is refused before anything starts."""

from __future__ import annotations

import logging
import random
from typing import Any

import optuna
import pytest

from rayft.config import load
from rayft.errors import UsageError
from rayft.tune.space import Space, described

BASE = {"model": {"base": "org/model"}, "data": {"train": "my.jsonl", "validation": "held.jsonl"}, "adapter": {}}


def space_of(space: dict[str, Any], **recipe: Any) -> Space:
    return Space.of(load(BASE | recipe | {"tune": {"space": space}}))


EVERYTHING = {
    "adapter.rank": {"choice": [4, 8, 16]},
    "adapter.target_modules": {"choice": ["attention", ["q_proj", "v_proj"]]},
    "adapter.init_lora_weights": {"choice": [True, "gaussian"]},
    "train.learning_rate": {"loguniform": [1e-5, 1e-3]},
    "train.weight_decay": {"uniform": [0, 0.1]},
    "train.warmup_steps": {"quniform": [0, 1, 0.25]},
    "train.global_batch_size": {"quniform": [4, 16, 4]},
    "train.max_steps": {"lograndint": [10, 100]},
    "data.train.0.weight": {"uniform": [0.5, 2]},
    "adapter.peft_args.rank_pattern": {"choice": [{}, {"layers.0": 2}]},
    "train.lr_scheduler_type": {"choice": ["cosine", "cosine_with_min_lr"]},
    "train.lr_scheduler_kwargs.min_lr_rate": {
        "uniform": [0.0, 0.5],
        "when": {"train.lr_scheduler_type": "cosine_with_min_lr"},
    },
    "train.epochs": 2,
}


def test_optuna_s_points_are_recipes_and_back() -> None:
    space = space_of(EVERYTHING)
    space.check()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(40):
        trial = study.ask()
        values = space.ask(trial)
        assert space.decode(trial.params) == values
        assert space.encode(values) == trial.params
        recipe = space.recipe(values)
        assert recipe.tune is None and recipe.adapter is not None and recipe.train.epochs == 2
        assert recipe.adapter.target_modules == values["adapter.target_modules"]
        assert recipe.train.learning_rate == values["train.learning_rate"]
        assert recipe.train.global_batch_size in (4, 8, 12, 16)
        assert recipe.train.warmup_steps in (0, 0.25, 0.5, 0.75, 1)
        assert 10 <= (recipe.train.max_steps or 0) < 100
        assert recipe.data.train[0].weight == values["data.train.0.weight"]
        conditional = recipe.train.lr_scheduler_type == "cosine_with_min_lr"
        assert ("train.lr_scheduler_kwargs.min_lr_rate" in values) is conditional
        assert recipe.train.lr_scheduler_kwargs == (
            {"min_lr_rate": values["train.lr_scheduler_kwargs.min_lr_rate"]} if conditional else {}
        )
        seen.add(conditional)
    assert seen == {True, False}


def test_optuna_is_asked_with_its_own_distributions() -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    space_of(EVERYTHING).ask(trial)
    found = trial.distributions
    assert found["train.learning_rate"] == optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True)
    assert found["train.max_steps"] == optuna.distributions.IntDistribution(10, 99, log=True)
    assert found["adapter.rank"] == optuna.distributions.CategoricalDistribution([4, 8, 16])
    assert "train.epochs" not in found, "a fixed value is no parameter"


def test_a_whole_section_can_be_searched() -> None:
    space = space_of({"adapter": {"choice": [None, {"rank": 4}, {"rank": 8, "use_dora": True}]}})
    space.check()
    recipes = [space.recipe(space.draw(random.Random(seed))) for seed in range(20)]
    assert {recipe.adapter.rank if recipe.adapter else None for recipe in recipes} == {None, 4, 8}
    rates = {recipe.train.learning_rate for recipe in recipes if recipe.adapter is None}
    assert rates == {1e-5}, "derived values follow the point, not the recipe without one"


def test_a_grid_has_every_point_once() -> None:
    space = space_of(
        {
            "adapter.use_rslora": {"choice": [True, False]},
            "adapter.rank": {"choice": [4, 8], "when": {"adapter.use_rslora": True}},
            "train.warmup_steps": {"quniform": [0, 0.5, 0.25]},
        }
    )
    points = space.grid()
    assert len(points) == (2 + 1) * 3
    assert {"adapter.use_rslora": False, "train.warmup_steps": 0.25} in points


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"adapter.rnk": {"choice": [1]}}, "Did you mean adapter.rank?"),
        ({"adapter.r": {"choice": [1]}}, "here: adapter.rank"),
        ({"train.learning_rate.x": {"choice": [1]}}, "no recipe has a key"),
        ({"tune.num_samples": {"choice": [1]}}, "the sweep itself"),
        ({"scale.workers": {"choice": [1]}}, "where a trial computes"),
        ({"data.train.3.weight": {"uniform": [0.5, 1]}}, "has 1 sources"),
        ({"storage": {"choice": ["x"]}}, "identifies the run"),
    ],
)
def test_paths_that_cannot_be_searched(space: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        space_of(space).check()
    assert caught.value.id == "R720" and says in caught.value.message


def test_the_seed_draws_the_held_out_share_too() -> None:
    space_of({"seed": {"randint": [0, 5]}}).check()
    with pytest.raises(UsageError, match="R720"):
        space_of({"seed": {"randint": [0, 5]}}, data={"train": "my.jsonl", "validation": 0.1}).check()


def test_a_space_without_a_valid_point() -> None:
    with pytest.raises(UsageError, match=r"R721.*all of 64 points.*train.learning_rate"):
        space_of({"train.learning_rate": {"uniform": [-2, -1]}}).check()


def test_a_choice_that_spoils_every_point() -> None:
    space = {"adapter.rank": {"choice": [4, 0]}, "train.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    with pytest.raises(UsageError, match=r"R721: tune.space: adapter.rank=0 is never valid.*whole number >= 1"):
        space_of(space).check()


def test_choices_that_only_sometimes_fit_are_let_through() -> None:
    space_of(
        {"adapter.rank": {"choice": [3, 4]}, "adapter.init_lora_weights": {"choice": [True, "orthogonal"]}}
    ).check()


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"adapter.rank": 5}, "not in choice [4, 8]"),
        ({"train.learning_rate": 1}, "not in loguniform"),
        ({"train.epochs": 1}, "not in the space"),
        ({"train.learning_rate": True}, "not in loguniform"),
    ],
)
def test_points_to_evaluate_are_of_the_space(point: dict[str, Any], says: str) -> None:
    space = space_of({"adapter.rank": {"choice": [4, 8]}, "train.learning_rate": {"loguniform": [1e-5, 1e-3]}})
    space.check([{"adapter.rank": 4}])
    with pytest.raises(UsageError) as caught:
        space.check([{"adapter.rank": 4}, point])
    assert caught.value.id == "R722" and says in caught.value.message and "points_to_evaluate.1" in caught.value.message


def test_a_blurred_comparison_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        space_of({"data.prompt_loss_weight": {"uniform": [0, 1]}}).check()
    assert "compare trials with care" in caplog.text


def test_in_words() -> None:
    space = space_of(
        {"adapter.rank": {"choice": [4]}, "adapter.dropout": {"uniform": [0, 0.1], "when": {"adapter.rank": 4}}}
    )
    assert dict(described(space)) == {
        "adapter.rank": "choice [4]",
        "adapter.dropout": "uniform [0.0, 0.1], when adapter.rank is 4",
    }
