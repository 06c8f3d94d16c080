"""The default space: the published formula of the learning rate, and ranks that the data can fill."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.config import load
from rayft.config.recipe import Recipe
from rayft.tune.prior import default_space, learning_rate
from rayft.tune.space import Space

BASE: dict[str, Any] = {"model": {"base": "org/model"}, "data": {"train": "my.jsonl"}}


def recipe(**sections: Any) -> Recipe:
    return load(BASE | sections).recipe


@pytest.mark.parametrize(
    ("hidden", "family", "rate"),
    [
        (2000, "llama", 5e-4),
        (2048, "llama", 4.9083e-4),  # Llama-3.2-1B
        (4096, "llama", 2.8564e-4),  # Llama-3.1-8B
        (8192, "llama", 1.6623e-4),  # Llama-3.1-70B
        (4096, "qwen3", 4.7295e-4),  # Qwen3-8B
        (4096, "gemma3", 5e-4),
    ],
)
def test_learning_rates_of_the_formula(hidden: int, family: str, rate: float) -> None:
    assert learning_rate(hidden, family) == pytest.approx(rate, rel=1e-4)
    assert learning_rate(hidden, family, lora=False) == pytest.approx(rate / 10, rel=1e-4)


def test_the_prior_is_a_point_of_the_space() -> None:
    resolved = load(BASE | {"adapter": {}})
    space, prior = default_space(resolved.recipe, 576, "llama")
    assert list(space) == ["train.learning_rate", "adapter.rank", "adapter.target_modules", "adapter.dropout"]
    whole = Space.of(resolved, space)
    whole.check([prior])
    assert whole.recipe(prior).train.learning_rate == learning_rate(576, "llama")


def test_ranks_end_where_the_data_is_stored() -> None:
    def ranks(tokens: int) -> list[int]:
        space, prior = default_space(recipe(adapter={}), 576, "llama", tokens=tokens, parameters_per_rank=300_000)
        assert prior["adapter.rank"] in space["adapter.rank"].values
        return space["adapter.rank"].values

    assert ranks(50_000) == [4, 8, 16]
    assert ranks(600_000 * 64) == [4, 8, 16, 32, 64]
    assert ranks(10**10) == [4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("adapter", [None, {"method": "ia3"}])
def test_other_methods_search_the_rate_alone(adapter: dict[str, Any] | None) -> None:
    space, prior = default_space(recipe(adapter=adapter), 576, "llama")
    assert list(space) == list(prior) == ["train.learning_rate"]
