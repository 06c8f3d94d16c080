"""A study on a known function, without a model and without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.config import load
from rayft.config.resolve import Resolved
from rayft.tune.study import Study
from tests.train.conftest import chat_file, recipe

__all__ = ["chat_file", "recipe"]

SPACE: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "adapter.rank": {"choice": [4, 8, 16]},
    "adapter.dropout": {"uniform": [0.0, 0.5]},
}


def sweep(**tune: Any) -> Resolved:
    """A recipe with a section `tune`."""
    return load(
        {
            "name": "sweep",
            "model": {"base": "org/model"},
            "data": {"train": "my.jsonl", "validation": "held.jsonl"},
            "adapter": {},
            "seed": 3,
            "tune": {"space": SPACE, "scheduler": "none"} | tune,
        }
    )


MakeStudy = Callable[..., Study]


@pytest.fixture
def study(tmp_path: Path) -> MakeStudy:
    """`study(budget=9, resume=True, **tune)`; the former one is closed first, as when its process has ended."""
    made: list[Study] = []

    def make(*, budget: float = 9, resume: bool = False, **tune: Any) -> Study:
        options = {name: tune.pop(name) for name in ("first", "clock", "patience") if name in tune}
        for former in made:
            former.close()
        made.append(Study(sweep(**tune), tmp_path, budget=budget, resume=resume, **options))
        return made[-1]

    return make
