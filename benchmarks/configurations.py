"""The eight LoRA configurations of `tune.py`, their data, and the recipes that each side trains them with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arms import ProcessArm
from questions import write_rows

from rayft import config
from rayft.models import hub
from rayft.train.preparation import settle

SEED = 17
CORES = 2
"""Threads of (a) and (c), lanes of (a'), processes of (b) at a time."""
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
CONFIGURATIONS: list[dict[str, Any]] = [
    {"adapter.rank": rank, "adapter.target_modules": modules, "train.learning_rate": rate}
    for rank, modules, rate in (
        (4, ["q_proj", "v_proj"], 2e-3),
        (8, ATTENTION, 1e-3),
        (8, "all-linear", 5e-4),
        (16, "all-linear", 1e-4),
        (16, MLP, 3e-5),
        (16, "all-linear", 2e-4),
        (28, ATTENTION, 1e-5),
        (32, "all-linear", 5e-3),
    )
]
"""Their ranks add up to 128."""
USUAL = 3
"""The configuration that stands for any of them where one adapter is alone."""


class Bench:
    """One data set of rows of equal length, and the arms that train on it."""

    def __init__(self, folder: Path, base: str, *, batch: int, length: int, steps: int, validation: int = 0) -> None:
        """steps: optimiser steps of each configuration. validation: rows held back for the loss."""
        self.folder, self.base, self.batch, self.length, self.steps = folder, base, batch, length, steps
        folder.mkdir(parents=True)
        count = batch * steps + validation
        write_rows(folder / "rows.jsonl", count, median=length + 16, spread=0)  # then cut to `length`
        self.validation = validation / count
        self.data = settle(config.load(self.recipe(USUAL)).recipe.model_dump(mode="json"), base, "cpu").data_folder

    @property
    def tokens(self) -> int:
        """Of one adapter's step."""
        return self.batch * self.length

    def recipe(self, number: int, *, batch: int | None = None) -> dict[str, Any]:
        """Of one configuration."""
        recipe: dict[str, Any] = self.shared()
        recipe["name"] = f"c{number}"
        for path, value in CONFIGURATIONS[number].items():
            section, key = path.split(".")
            recipe[section][key] = value
        recipe["train"]["global_batch_size"] = batch or self.batch
        return recipe

    def shared(self) -> dict[str, Any]:
        # Trained on all tokens, or a row whose answer is cut off would be left out.
        data: dict[str, Any] = {"train": str(self.folder / "rows.jsonl"), "max_length": self.length, "train_on": "all"}
        if self.validation:
            data["validation"] = self.validation
        return {
            "storage": str(self.folder / "runs"),
            "seed": SEED,
            "model": {"base": self.base, "dtype": "bf16"},
            "adapter": {"method": "lora", "alpha": 32},
            "data": data,
            "train": {"max_steps": self.steps, "global_batch_size": self.batch, "report_to": []},
            "scale": {"device": "cpu"},
        }

    def adapters(self, name: str, way: str, recipes: Sequence[dict[str, Any]], threads: int = CORES) -> ProcessArm:
        """`adapters.py` in a process of its own; way: pack or sequential."""
        options = {"recipes": list(recipes), "base": hub.fetch(self.base), "data": self.data}
        return ProcessArm(name, "adapters.py", [way, json.dumps(options | {"steps": self.steps, "threads": threads})])

    def everything(self) -> list[dict[str, Any]]:
        return [self.recipe(number) for number in range(len(CONFIGURATIONS))]

    def trials(self) -> list[dict[str, Any]]:
        """For plain Ray Tune."""
        settings = {"base": hub.fetch(self.base), "data": self.data, "scratch": str(self.folder), "steps": self.steps}
        return [settings | {"recipe": recipe, "gated": False} for recipe in self.everything()]

    def sweep_recipe(self, name: str, **tune: Any) -> dict[str, Any]:
        """For rayft: two lanes, the same configurations, and a thread each: the cluster counts more cores than there
        are."""
        space = {path: {"choice": _distinct(one[path] for one in CONFIGURATIONS)} for path in CONFIGURATIONS[0]}
        shape = {"execution": "pack", "lanes": CORES, "pack_size": len(CONFIGURATIONS) // CORES}
        points = {"space": space, "points_to_evaluate": CONFIGURATIONS, "num_samples": len(CONFIGURATIONS)}
        scale = {"device": "cpu", "cpus_per_worker": 1}
        return self.shared() | {"name": name, "scale": scale, "tune": {**points, **shape, **tune}}

    def speed(self, seconds: Sequence[float]) -> float:
        """Tokens per second of all adapters together, of the median step."""
        return len(CONFIGURATIONS) * self.tokens / statistics.median(seconds)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """In their order; lists among them."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]
