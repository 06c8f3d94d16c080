"""Every recipe that is shipped is valid, and says at its head how to run it, on what, and what to expect."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from rayft.config import load
from rayft.config.docs import schema

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))


def test_there_are_enough() -> None:
    assert {file.stem for file in RECIPES} >= {
        *("lora", "qlora", "qlora-8b-2x24gb", "full-zero3-8gpu", "continued-pretraining"),
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load(file).recipe
    for source in recipe.data.train:
        assert Path(source.path).exists(), source.path
    jsonschema.validate(YAML(typ="safe", pure=True).load(file), schema())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_says_how_to_run_it(file: Path) -> None:
    head = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#")).lower()
    for word in ("command", "hardware", "expected"):
        assert word in head, f"{file.name} does not state its {word}"
    assert f"examples/recipes/{file.name}" in head
