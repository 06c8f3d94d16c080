"""One curve, however it is computed: padding, accumulation, workers, checkpointing and a plain loop all agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from rayft.data import Prepared
from rayft.runs.folder import RunFolder
from rayft.train import fit
from tests.train.conftest import Recipes
from tests.train.curves import Curve, assert_same, curve_of, plain_loop

pytestmark = pytest.mark.long

OPTIMIZERS = [{"train.optim": "sgd", "train.learning_rate": 0.05}, {"train.optim": "adamw_torch"}]
FULL: dict[str, Any] = {"adapter": None}


def trained(recipe: dict[str, Any]) -> Curve:
    return curve_of(fit(recipe, mode="overwrite", answer=None, quiet=True).path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", [{}, FULL], ids=["lora", "full"])
def test_the_curve_equals_a_plain_loop(recipe: Recipes, optimizer: dict[str, Any], method: dict[str, Any]) -> None:
    plain = recipe(**optimizer, **method)
    result = fit(plain, answer=None, quiet=True)
    record = RunFolder.open(result.path).record
    data = Prepared(f"{plain['storage']}/.cache/data/{record.hashes['data']}", record.hashes["data"])

    def adapt(model: torch.nn.Module) -> torch.nn.Module:
        if method:
            return model
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    expected = plain_loop(plain, data, adapt, steps=20)
    assert expected.losses[0] > expected.losses[-1], "nothing was learned, so nothing is compared"
    assert_same(curve_of(result.path), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
def test_layouts_of_a_step_agree(recipe: Recipes, optimizer: dict[str, Any]) -> None:
    reference = trained(recipe(**optimizer))
    for change in (
        {"data.padding_free": False},
        {"train.micro_batch_size": 1},
        {"train.micro_batch_size": 2},
        {"train.micro_batch_size": 3, "data.padding_free": False},
        {"train.gradient_checkpointing": True},
    ):
        assert_same(trained(recipe(**optimizer, **change)), reference)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
def test_two_workers_agree_with_one(recipe: Recipes, ray_cluster: str, optimizer: dict[str, Any]) -> None:
    one = trained(recipe(**optimizer))
    assert_same(trained(recipe(**optimizer, **{"scale.workers": 2, "train.micro_batch_size": 1})), one)


@pytest.mark.slow
def test_full_fine_tuning_agrees_too(recipe: Recipes, ray_cluster: str) -> None:
    sgd = OPTIMIZERS[0] | FULL
    one = trained(recipe(**sgd))
    assert_same(trained(recipe(**sgd, **{"train.micro_batch_size": 2, "train.gradient_checkpointing": True})), one)
    assert_same(trained(recipe(**sgd, **{"scale.workers": 2})), one)


@pytest.mark.parametrize(
    "optimizer", [OPTIMIZERS[0], pytest.param(OPTIMIZERS[1], marks=pytest.mark.slow)], ids=["sgd", "adamw"]
)
def test_gradual_unfreezing_with_two_workers_agrees_with_one(
    recipe: Recipes, ray_cluster: str, optimizer: dict[str, Any]
) -> None:
    phases = [{"start": 0, "last_blocks": 1}, {"start": 4, "last_blocks": 2}, {"start": 8, "patterns": [".*"]}]
    unfrozen = recipe(**optimizer, **FULL, **{"train.trainable": phases, "train.max_steps": 12})
    one = trained(unfrozen)
    two = unfrozen | {"scale": unfrozen["scale"] | {"workers": 2}}
    assert_same(trained(two | {"train": two["train"] | {"micro_batch_size": 1}}), one)
    frozen = trained(recipe(**optimizer, **FULL, **{"train.trainable": phases[:1], "train.max_steps": 12}))
    assert frozen.losses[:5] == one.losses[:5] and frozen.losses[5] != one.losses[5], "the phases do nothing"


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
def test_compiled_agrees_with_eager(
    recipe: Recipes, tiny_model_factory: Callable[..., str], optimizer: dict[str, Any]
) -> None:
    small = {"model.base": tiny_model_factory(num_hidden_layers=1), "train.max_steps": 6}
    eager = trained(recipe(**optimizer, **small))
    torch._dynamo.reset()
    counters["stats"].clear()
    assert_same(trained(recipe(**optimizer, **small, **{"train.torch_compile": True})), eager)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_packing_is_another_trajectory_with_the_same_tokens(recipe: Recipes) -> None:
    packed = recipe(**{"data.packing": True, "data.max_length": 128, "train.epochs": 1, "train.max_steps": None})
    bins = trained(packed)
    single = trained(recipe(**{"train.epochs": 1, "train.max_steps": None}))
    assert len(bins.losses) < len(single.losses)
    assert_same(trained(packed | {"name": "again", "data": packed["data"] | {"padding_free": False}}), bins)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_with_two_workers_agrees_with_one(recipe: Recipes, ray_cluster: str, strategy: str) -> None:
    one = trained(recipe())
    two = {"scale.workers": 2, "scale.strategy": strategy, "train.micro_batch_size": 2}
    assert_same(trained(recipe(**two)), one, loss=1e-5)
