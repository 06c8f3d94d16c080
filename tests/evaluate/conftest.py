"""A tiny chat data set, its prepared form, and a finished run with a random LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft import config
from rayft.config.recipe import Recipe
from rayft.data import prepare
from rayft.models import adapters, hub, load
from rayft.runs.folder import RunFolder

CITIES = ["Paris", "Rome", "Oslo", "Lima", "Bern", "Cairo", "Quito", "Delhi", "Accra"]


def write_chats(path: Path, cities: list[str]) -> str:
    rows = [
        [
            {"role": "system", "content": "Answer with JSON."},
            {"role": "user", "content": f"What is the weather like in {city}{'?' * (i + 1)}"},
            {"role": "assistant", "content": json.dumps({"tool": "weather", "city": city})},
        ]
        for i, city in enumerate(cities)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(training file, held-out file with 5 chats)."""
    folder = tmp_path_factory.mktemp("chats")
    return write_chats(folder / "train.jsonl", CITIES), write_chats(folder / "heldout.jsonl", CITIES[::2])


def _stock_loss(model: Any, examples: Any) -> float:
    """Mean over all supervised tokens, one example at a time, with the loss of transformers."""
    total = count = 0.0
    for row in examples:
        ids = torch.tensor(row["input_ids"].astype("int64"))[None]
        weights = torch.tensor(row["loss_weights"])[None]
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=ids.masked_fill(weights == 0, -100), use_cache=False).loss
        total += float(loss) * float(weights.sum())
        count += float(weights.sum())
    return total / count


@pytest.fixture(scope="session")
def stock_loss() -> Callable[[Any, Any], float]:
    """``stock_loss(model, examples)``: see `_stock_loss`."""
    return _stock_loss


@pytest.fixture
def plain(tmp_path: Path, tiny_model_folder: str, chats: tuple[str, str]) -> dict[str, Any]:
    """A recipe as plain data: tiny model, fp32, LoRA, in this process."""
    return {
        "name": "tiny",
        "storage": str(tmp_path / "runs"),
        "model": {"base": tiny_model_folder, "dtype": "fp32"},
        "adapter": {"method": "lora"},
        "data": {"train": chats[0], "validation": chats[1]},
        "scale": {"workers": 0, "device": "cpu"},
        "evaluate": {"metrics": ["exact_match"], "samples": 2, "max_new_tokens": 6, "batch_size": 2},
    }


def tuned(recipe: Recipe) -> tuple[Any, Any]:
    """(model, tokenizer): the recipe's model with what it trains moved away from its start."""
    folder = hub.fetch(recipe.model.base)
    tokenizer = load.load_tokenizer(recipe, folder)
    model = adapters.attach(load.load_base(recipe, folder), recipe, tokenizer)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, tokenizer


@pytest.fixture
def prepared(plain: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[Recipe, Any, Any, Any]]:
    """``prepared(overrides) -> (recipe, model, tokenizer, Prepared)``."""

    def make(*overrides: str) -> tuple[Recipe, Any, Any, Any]:
        recipe = config.load(plain, overrides).recipe
        model, tokenizer = tuned(recipe)
        return recipe, model, tokenizer, prepare(recipe, tokenizer, str(tmp_path / "cache"))

    return make


@pytest.fixture
def finished_run(plain: dict[str, Any]) -> Callable[..., RunFolder]:
    """``finished_run(overrides)`` of a run whose adapter (or model) is random."""

    def make(*overrides: str) -> RunFolder:
        resolved = config.load(plain, overrides)
        model, tokenizer = tuned(resolved.recipe)
        kind = "adapter" if resolved.recipe.adapter else "model"
        with RunFolder.create(resolved, "train", "fail") as run:
            with run.writing(kind) as folder:
                adapters.save(model, folder, tokenizer)
            run.finish("finished", kind=kind)
        return run

    return make
