"""`--dry-run`: space, mode and reason, without a cluster."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.errors import UsageError
from rayft.tune import dry_run
from tests.train.conftest import Recipes

BASE: dict[str, Any] = {"data.validation": 0.25, "train.max_steps": 9}


def test_what_would_be_searched(recipe: Recipes) -> None:
    space = {"adapter.rank": {"choice": [2, 4]}, "train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    planned = dry_run(recipe(**BASE, tune={"space": space, "num_samples": 5}))
    assert planned.mode == "pack" and planned.plan["trials"] == 5
    assert planned.space == {"adapter.rank": "choice [2, 4]", "train.learning_rate": "loguniform [0.0001, 0.01]"}
    assert planned.trial.plan["total_steps"] == 9
    assert json.loads(json.dumps(planned.to_json(), allow_nan=False))["mode"] == "pack"
    text = io.StringIO()
    Console(file=text, width=160).print(planned.to_rich())
    for words in ("adapter.rank", "choice [2, 4]", "pack: the trials are LoRA adapters", "lowest validation_loss"):
        assert words in text.getvalue()
    assert not Path(recipe()["storage"]).exists() or not list(Path(recipe()["storage"]).glob("*/run.json"))


def test_the_default_space_knows_the_model(recipe: Recipes) -> None:
    planned = dry_run(recipe(**BASE))
    low, high = json.loads(planned.space["train.learning_rate"].removeprefix("loguniform "))
    assert (low * high) ** 0.5 == pytest.approx(5e-4 * (2000 / 64) ** 0.781)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": None}, "adapter"),
        ({"tune.space": {"adapter.use_dora": {"choice": [True, False]}}}, "adapter.use_dora"),
        ({"tune.space": {"train.gradient_checkpointing": {"choice": [True, False]}}}, "cannot share a pack"),
        ({"tune.execution": "classic"}, "asks for it"),
        ({"scale.workers": 2}, "several workers"),
        ({"evaluate.metrics": ["exact_match"], "tune.metric": "exact_match", "tune.mode": "max"}, "generated answers"),
    ],
)
def test_classic_and_why(recipe: Recipes, changes: dict[str, Any], reason: str) -> None:
    planned = dry_run(recipe(**BASE | changes))
    assert planned.mode == "classic" and reason in planned.reason


def test_a_bad_space_is_refused(recipe: Recipes) -> None:
    with pytest.raises(UsageError, match="R720"):
        dry_run(recipe(**BASE, tune={"space": {"adapter.rnk": {"choice": [1]}}}))
