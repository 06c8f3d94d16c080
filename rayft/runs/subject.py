"""What a verb works on: from a recipe, a run or a folder to a recipe with the trained weights that belong to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft import config
from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.runs import reference
from rayft.runs.folder import RunFolder
from rayft.runs.reference import AdapterRef
from rayft.runs.storage import locate

ANYWHERE = ("scale.strategy=ddp", "scale.device=auto")
"""A run is used on whatever machine there is, not on the cluster it was trained on."""


@dataclass(frozen=True)
class Subject:
    name: str
    recipe: Recipe
    trained: AdapterRef | None
    """None = the recipe's base model alone."""


def subject(
    source: str | Path | Mapping[str, Any] | Recipe | None, overrides: Sequence[str] = (), *, data: str | None = None
) -> Subject:
    """`run:NAME[@...]` or a folder: the trained weights, with their run's recipe. A recipe: its run where there is one,
    else its base model. Overrides apply to the recipe in every case.

    data: stands for `data.train` where weights belong to no run, and so come without a recipe.

    Raises:
        UsageError: R705 weights outside a run without ``data``; R1xx of the recipe, R4xx of the reference.
    """
    if isinstance(source, str | Path) and is_weights(str(source)):
        return _trained(str(source), overrides, data)
    return _of_recipe(source, overrides)


def is_weights(source: str) -> bool:
    """Whether it is a reference or a folder, not a recipe."""
    in_bucket = "://" in source and not source.endswith((".yaml", ".yml"))
    return source.startswith("run:") or Path(source).is_dir() or in_bucket


def _of_recipe(source: Any, overrides: Sequence[str]) -> Subject:
    recipe = config.load(source, overrides).recipe
    if (locate(recipe.storage) / recipe.name / "run.json").is_file():
        return Subject(recipe.name, recipe, reference.resolve(f"run:{recipe.name}", recipe.storage))
    return Subject(recipe.name, recipe, None)


def _trained(source: str, overrides: Sequence[str], data: str | None) -> Subject:
    trained = reference.resolve(source, overridden("storage", overrides))
    if trained.run is None:
        return Subject(source, _recipe_of_folder(trained, overrides, data), trained)
    run = RunFolder.open(trained.run)
    recipe = run.recipe()
    workers = [] if recipe.scale.workers == 0 else ["scale.workers=auto"]
    recipe = config.load(recipe, [*ANYWHERE, *workers, *overrides]).recipe
    return Subject(run.name, recipe, trained)


def _recipe_of_folder(trained: AdapterRef, overrides: Sequence[str], data: str | None) -> Recipe:
    """Weights outside a run bring no recipe: only their base is known."""
    if data is None:
        raise UsageError(
            "R705",
            f"{trained.path} belongs to no run, so it is unknown what to score it on",
            "name held-out examples: rayft evaluate FOLDER data.validation=FILE",
        )
    return config.load({"model": {"base": _base_of(trained)}, "data": {"train": data}}, overrides).recipe


def _base_of(trained: AdapterRef) -> str:
    if trained.kind == "model":
        return trained.path
    return str(json.loads((locate(trained.path) / "adapter_config.json").read())["base_model_name_or_path"])


def overridden(key: str, overrides: Sequence[str]) -> str | None:
    """The value of the last override of a key."""
    values = [value for name, _, value in (override.partition("=") for override in overrides) if name == key]
    return values[-1] if values else None
