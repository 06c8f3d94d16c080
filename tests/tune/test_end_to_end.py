"""The real model: a sweep finds a recipe that is better than a poor one, beyond what another seed would explain."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, variance
from typing import Any

import pytest

from rayft.tune import search

ROOT = Path(__file__).parents[2]
SEEDS = [1, 2, 3]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(3600)
def test_the_best_of_twelve_trials_beats_a_low_learning_rate(ray_cluster: str, tmp_path: Path) -> None:
    poor: dict[str, Any] = {
        "storage": str(tmp_path),
        "model": {"base": "smollm2-135m-instruct"},
        "adapter": {"method": "lora"},
        "data": {
            "train": str(ROOT / "examples/data/orders.jsonl"),
            "validation": [{"path": str(ROOT / "examples/data/orders_heldout.jsonl"), "limit": 24}],
            "max_length": 128,
        },
        "train": {"max_steps": 24, "global_batch_size": 4, "learning_rate": 1e-5, "eval_steps": 8, "report_to": []},
        "scale": {"device": "cpu"},
    }
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}, "adapter.rank": {"choice": [4, 8, 16]}}
    sweep = search(
        poor | {"name": "sweep", "tune": {"space": space, "num_samples": 12, "scheduler_args": {"grace_period": 8}}},
        quiet=True,
    )
    assert len(sweep.rows) == 12

    def with_seeds(name: str, recipe: dict[str, Any]) -> list[float]:
        seeds = {"space": {"seed": {"grid_search": SEEDS}}, "search_alg": "grid", "scheduler": "none"}
        result = search(recipe | {"name": name, "storage": str(tmp_path), "tune": seeds}, quiet=True)
        return [row.metrics["validation_loss"] for row in result.rows]

    before = with_seeds("before", poor)
    after = with_seeds("after", sweep.best_recipe.model_dump(mode="json", exclude_unset=True))
    standard_error = ((variance(before) + variance(after)) / len(SEEDS)) ** 0.5
    assert fmean(before) - fmean(after) > 2 * standard_error
