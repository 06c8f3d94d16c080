"""A small recipe for training tests: uneven chat rows, prompt weights, a ragged last step."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.runs.lines import Lines
from rayft.runs.metrics import MetricsLog
from rayft.runs.storage import locate
from rayft.train.recorder import Recorder

WORDS = [
    "order",
    "two",
    "pizzas",
    "for",
    "Anna",
    "send",
    "them",
    "to",
    "Garden",
    "Street",
    "on",
    "Friday",
    "please",
    "thank",
    "you",
    "now",
    "later",
    "maybe",
]


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of 1 or 2 turns with answers of 1 to 14 words: lengths differ by a factor of about five."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    def turn() -> list[dict[str, str]]:
        return [{"role": "user", "content": words(12)}, {"role": "assistant", "content": words(14)}]

    return [{"messages": [message for _ in range(draw.randint(1, 2)) for message in turn()]} for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """22 chats: with a global batch of 4, the last step of an epoch has 2."""
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", chat_rows(22))


def recorder_in(folder: Path, clock: Callable[[], float] = time.time) -> Recorder:
    """The recorder of the files in a folder."""
    metrics = MetricsLog(locate(folder / "metrics.jsonl"), folder, clock)
    return Recorder(metrics, Lines(locate(folder / "events.jsonl"), folder), clock)


Recipes = Callable[..., dict[str, Any]]


@pytest.fixture
def recipe(tiny_model_folder: str, chat_file: str, tmp_path: Path) -> Recipes:
    """`recipe(**{"train.max_steps": 3, ...})`: plain data of a recipe with some values changed."""

    def make(**changes: Any) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "name": "test",
            "storage": str(tmp_path / "runs"),
            "model": {"base": tiny_model_folder, "dtype": "fp32"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": chat_file, "prompt_loss_weight": 0.25},
            "train": {
                "max_steps": 20,
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "learning_rate": 1e-3,
                "save_steps": 1000,
                "report_to": [],
            },
            "scale": {"workers": 0, "device": "cpu"},
        }
        for path, value in changes.items():
            *sections, key = path.split(".")
            section = plain
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        return plain

    return make
