"""The section `tune:`: its spellings, and one message per mistake."""

from __future__ import annotations

from typing import Any

import pytest
from ray import tune as ray_tune

from rayft.config import load
from rayft.config.document import Document
from rayft.config.keys import exists
from rayft.config.tune import KINDS, Distribution, Tune, ask_order
from rayft.errors import UsageError

MINIMAL = {"model": {"base": "org/model"}, "data": {"train": "my.jsonl"}, "adapter": {}}


def tune(section: dict[str, Any], *overrides: str) -> Tune:
    found = load(MINIMAL | {"tune": section}, overrides).recipe.tune
    assert found is not None
    return found


def test_distributions_have_ray_tune_s_names() -> None:
    assert all(hasattr(ray_tune, kind) for kind in KINDS)


def test_file_override_and_fixed_value_are_the_same_space() -> None:
    written = tune({"space": {"adapter.rank": {"choice": [4, 8]}, "train.epochs": 2}})
    nested = tune({"space": {"adapter": {"rank": {"choice": [4, 8]}}, "train": {"epochs": {"choice": [2]}}}})
    given = tune({}, "tune.space.adapter.rank.choice=[4, 8]", "tune.space.train.epochs=2")
    assert written == nested == given
    assert list(written.space) == ["adapter.rank", "train.epochs"]
    assert written.space["train.epochs"].values == [2]


def test_the_resolved_recipe_loads_back() -> None:
    space = {
        "adapter.rank": {"choice": [4, 8]},
        "adapter.dropout": {"uniform": [0, 0.1], "when": {"adapter.rank": 8}},
        "train.lr_scheduler_kwargs": {"choice": [{}, {"min_lr_rate": 0.1}]},
    }
    resolved = load(MINIMAL | {"tune": {"space": space}})
    assert load(Document.parse(resolved.to_yaml()).data).recipe == resolved.recipe
    assert "grid_search" not in resolved.to_yaml(), "kinds that were not given are not printed"


def test_parents_are_asked_first() -> None:
    space = {
        "a": Distribution(choice=[1], when={"b": [1]}),
        "b": Distribution(choice=[1], when={"c": [1]}),
        "c": Distribution(choice=[1]),
    }
    assert ask_order(space) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"a": {"choice": []}}, "choice is empty"),
        ({"a": {"uniform": [2, 1]}}, "reversed: lower 2"),
        ({"a": {"loguniform": [1, 1]}}, "the range is empty"),
        ({"a": {"loguniform": [0, 1]}}, "begins above 0"),
        ({"a": {"quniform": [0, 1]}}, "[lower, upper, q]"),
        ({"a": {"quniform": [0, 1, 2]}}, "q lies above 0 and within"),
        ({"a": {"randint": [1, 2, 3]}}, "[lower, upper]"),
        ({"a": {"uniform": [1, 2], "choice": [1]}}, "not choice and uniform"),
        ({"a": {"when": {}}}, "give one of choice"),
        ({"a": [1, 2]}, "write a: {choice: [...]}"),
        ({"a": {"choice": [1], "when": {"b": 1}}}, "b is not in the space"),
        ({"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}}, "circle"),
        ({"a": {"grid_search": [1]}}, "needs search_alg: grid"),
    ],
)
def test_a_space_that_cannot_be_searched(space: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        tune({"space": space})
    assert caught.value.id == "R105" and says in caught.value.message


@pytest.mark.parametrize(
    ("override", "id", "says"),
    [
        ("tune.metrc=loss", "R104", "Did you mean tune.metric?"),
        ("tunes.metric=loss", "R104", "Did you mean tune?"),
        ("tune.space={a: {choise: [1]}}", "R104", "choice?"),
        ("tune.search_alg=bayes", "R105", "tpe, gp, cmaes"),
        ("tune.mode=minimum", "R105", "min, max"),
        ("tune.lanes=0", "R105", "1 or more"),
        ("tune.num_samples=0", "R105", ">= 1"),
        ("tune={metrics: [a, b], modes: [min]}", "R105", "modes has 1 entries"),
        ("tune={metrics: [a, a]}", "R105", "twice"),
        ("tune={metrics: [a, b], search_alg: cmaes}", "R105", "one objective"),
        ("tune={search_alg: grid, space: {a: {uniform: [0, 1]}}}", "R105", "a has a range"),
        ("tune.scheduler_args={grace_period: 5, max_t: 2}", "R105", "above scheduler_args.max_t"),
        ("tune.scheduler_args={reduction_factor: 1}", "R105", "> 1"),
    ],
)
def test_other_mistakes(override: str, id: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(MINIMAL, [override])
    assert caught.value.id == id and says in caught.value.message


def test_objectives() -> None:
    assert Tune().objectives == [("validation_loss", "min")]
    several = tune({"metrics": ["validation_loss", "trainable_parameters"]})
    assert several.objectives == [("validation_loss", "min"), ("trainable_parameters", "min")]


@pytest.mark.parametrize(
    ("path", "there"),
    [
        (["adapter", "rank"], True),
        (["adapter", "rnk"], False),
        (["data", "train", 0, "weight"], True),
        (["data", "train", "weight"], False),
        (["adapter", "peft_args", "rank_pattern"], True),
        (["train", "learning_rate", "x"], False),
        (["adapter"], True),
    ],
)
def test_which_paths_a_recipe_has(path: list[str | int], there: bool) -> None:
    assert exists(path) is there
