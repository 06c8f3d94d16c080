"""Generated pages and the schema are up to date, and say what the validation does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rayft.config import docs, load
from rayft.config.docs import COLUMNS, METHODS
from rayft.config.keys import keys
from rayft.config.synonyms import TABLE, synonym
from rayft.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", docs.files())
def test_the_committed_file_is_what_the_generator_prints(path: str) -> None:
    assert (ROOT / path).read_text() == docs.files()[path], "run: python -m rayft.config.docs"


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_agrees_with_the_validation(method: str) -> None:
    """Each cell is tried as a recipe."""
    matrix = docs.compatibility_page().partition("## Refused")[0]
    (line,) = [line for line in matrix.splitlines() if line.startswith(f"| {method} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    base: dict[str, Any] = {"model": {"base": "m"}, "data": {"train": "x.jsonl"}}
    overrides = {
        "full": [],
        "partial, BitFit": ["train.trainable={last_blocks: 1}"],
        "gradual unfreezing": ["train.trainable=[{last_blocks: 1}]"],
    }.get(method, [f"adapter.method={method}"])
    for (column, facts), cell in zip(COLUMNS.items(), cells, strict=True):
        options = [f"{key}={json.dumps(value)}" for key, value in facts.items()]
        try:
            load(base, [*overrides, *options])
        except UsageError as error:
            assert error.id == "R107" and cell.startswith("no"), (method, column, error)
        else:
            assert cell in ("yes", "gpu"), (method, column)


def test_the_schema_agrees_with_the_validation() -> None:
    schema = docs.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good: list[dict[str, Any]] = [
        {"model": {"base": "m"}, "data": {"train": "x.jsonl"}},
        {"model": {"base": "m"}, "data": {"train": ["x.jsonl", {"path": "y.jsonl", "weight": 2}], "validation": 0.1}},
        {"model": {"base": "m"}, "data": {"train": "x.jsonl"}, "scale": {"workers": [1, 4]}, "adapter": {"rank": 4}},
        {"model": {"base": "m"}, "data": {"train": "x.jsonl"}, "train": {"trainable": [{"last_blocks": 1}]}},
    ]
    bad: list[dict[str, Any]] = [
        {"model": {"base": "m"}},
        {"model": {"base": "m"}, "data": {"train": "x.jsonl"}, "nmae": "x"},
        {"model": {"base": "m"}, "data": {"train": "x.jsonl"}, "train": {"epochs": "two"}},
        {"model": {"base": "m"}, "data": {"train": "x.jsonl"}, "adapter": {"rank": 0}},
    ]
    for recipe in good:
        jsonschema.validate(recipe, schema)
        load(recipe)
    for recipe in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe, schema)
        with pytest.raises(UsageError):
            load(recipe)


def test_synonyms_point_at_keys_that_exist() -> None:
    known = {key.path for key in keys()} | {"adapter", "train.trainer_args"}
    for entry in TABLE:
        for here in filter(None, entry.here.split(" and ")):
            assert here in known or here.rpartition(".")[0] in known, (entry.name, here)


def test_a_synonym_is_never_a_key_of_the_section_it_points_into() -> None:
    known = {key.path for key in keys()}
    for entry in TABLE:
        for here in filter(None, entry.here.split(" and ")):
            section = here.rpartition(".")[0]
            assert f"{section}.{entry.name}" not in known, entry.name
    assert len({entry.name for entry in TABLE}) == len(TABLE)
    assert synonym("anything.at.all") is None


def test_every_error_of_the_recipe_and_the_command_line_has_a_section() -> None:
    raised = set()
    for file in [*(ROOT / "rayft/config").glob("*.py"), *(ROOT / "rayft/cli").glob("*.py")]:
        raised |= set(re.findall(r'"(R[01]\d\d)"', file.read_text()))
    page = (ROOT / "docs/errors/recipe.md").read_text()
    documented = re.findall(r"^## (R\d{3}) \S", page, flags=re.MULTILINE)
    assert raised == set(documented)
    assert documented == sorted(set(documented))
