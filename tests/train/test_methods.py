"""Every method through a whole run: it learns, resumes bit for bit, and its result loads with the trained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.runs.folder import RunFolder
from rayft.train import TrainResult, fit
from tests.train import faults
from tests.train.conftest import Recipes
from tests.train.curves import assert_same, curve_of
from tests.train.test_faults import assert_identical, events

pytestmark = pytest.mark.long

PADDED = {"data.padding_free": False}
FULL: dict[str, Any] = {"adapter": None, "train.learning_rate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "l2-sp": FULL | {"train.l2_sp": 0.1},
    "partial": FULL | {"train.trainable": {"last_blocks": 1}},
    "patterns": FULL | {"train.trainable": {"patterns": [r"mlp\."]}},
    "phases": FULL | {"train.trainable": [{"start": 0, "last_blocks": 1}, {"start": 6, "last_blocks": 3}]},
    "bitfit": FULL | {"train.trainable": {"bias": True, "add_bias": True}},
    "lora": {"adapter.dropout": 0.1},
    "rslora": {"adapter.use_rslora": True},
    "dora": {"adapter.use_dora": True},
    "pissa": {"adapter.init_lora_weights": "pissa"},
    "lora-plus": {"adapter.loraplus_lr_ratio": 8.0},
    "modules-to-save": {"adapter.modules_to_save": ["lm_head"]},
    "adalora": {"adapter.method": "adalora"},
    "ia3": {"adapter": {"method": "ia3"}},
    "oft": {"adapter": {"method": "oft"}},
    "prefix": {"adapter": {"method": "prefix", "num_virtual_tokens": 4}} | PADDED,
    "prompt": {"adapter": {"method": "prompt", "num_virtual_tokens": 4}} | PADDED,
    "p-tuning": {"adapter": {"method": "p_tuning", "num_virtual_tokens": 4}} | PADDED,
    "new-tokens": {"model.add_tokens": ["<call>"]},
    "nf4": {"model.quantization": "nf4"},
    "int8": {"model.quantization": "int8"},
}


@pytest.fixture
def faulty(recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A recipe of 14 steps whose loss function may go wrong in its eleventh call, one call per step."""
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))

    def make(function: str, changes: dict[str, Any]) -> dict[str, Any]:
        fault = {"train.loss_function": f"{faults.__file__}:{function}", "name": function.replace("_", "-")}
        steps = {"train.max_steps": 14, "train.save_steps": 4, "data.prompt_loss_weight": 0.0}
        return recipe(**fault | steps | changes)

    return make


def train(plain: dict[str, Any], **options: Any) -> TrainResult:
    return fit(plain, answer=None, quiet=True, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_resumes_and_loads(faulty: Callable[..., Any], method: str) -> None:
    undisturbed = train(faulty("plain", METHODS[method]))
    disturbed = train(faulty("crash_once", METHODS[method]))
    assert_identical(disturbed, undisturbed)
    losses = curve_of(undisturbed.path).losses
    assert min(losses[7:]) < losses[0], "it learned nothing"
    counts = events(undisturbed.path, "started")[0]
    assert 0 < counts["trainable_parameters"] <= counts["total_parameters"]
    model, tokenizer = undisturbed.load()
    with torch.no_grad():
        ids = tokenizer("order two pizzas", return_tensors="pt")["input_ids"]
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_nf4_evaluating_in_between_changes_nothing(recipe: Recipes) -> None:
    nf4 = {"model.quantization": "nf4", "data.validation": 0.2}
    often = train(recipe(name="often", **nf4, **{"train.eval_steps": 2}))
    never = train(recipe(name="rarely", **nf4, **{"train.eval_steps": 1000}))
    assert curve_of(often.path) == curve_of(never.path)
    rows = RunFolder.open(often.path).metrics()
    assert sum("validation_loss" in row for row in rows) == 10


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "zero2"])
def test_nf4_on_two_workers(faulty: Callable[..., Any], ray_cluster: str, strategy: str) -> None:
    """The curve of one worker, also where it is interrupted and resumed half-way."""
    nf4 = {"model.quantization": "nf4"}
    one = train(faulty("plain", nf4))
    variables = {"scale.env": ["RAYFT_TEST_FAULT"], "train.micro_batch_size": 2}
    two = train(faulty("crash_once", nf4 | variables | {"scale.workers": 2, "scale.strategy": strategy}))
    assert_same(curve_of(two.path), curve_of(one.path), loss=1e-5, norm=1e-4)
    assert events(two.path, "restart")
    model, _ = two.load()
    assert any("lora_B" in name and parameter.any() for name, parameter in model.named_parameters())
