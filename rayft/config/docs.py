"""Pages and files that are written from the recipe's models and tables: `python -m rayft.config.docs [FOLDER]`.

A test holds the committed files equal to what this prints, so documentation and validation cannot drift apart.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from rayft.config.adapter import AdapterMethod
from rayft.config.compatibility import NOT_SET, SET, TABLE, UNUSED, Condition, Row
from rayft.config.keys import allowed, default, sections
from rayft.config.recipe import Recipe
from rayft.config.resolve import VIRTUAL_TOKEN_METHODS
from rayft.config.synonyms import TABLE as SYNONYMS
from rayft.config.trainer_args import PEFT_REFUSED, REFUSED

GENERATED = "<!-- Written by `python -m rayft.config.docs`; change the tables in rayft/config instead. -->"

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "partial, BitFit": {"train.trainable": "weights"},
    "gradual unfreezing": {"train.trainable": "phases"},
    **{method: {"adapter": method, "adapter.method": method} for method in get_args(AdapterMethod)},
}
"""What the rows of the matrices stand for, as facts that the compatibility table looks at."""

COLUMNS: dict[str, dict[str, Any]] = {
    "nf4, fp4": {"model.quantization": "nf4"},
    "int8": {"model.quantization": "int8"},
    "ddp": {"scale.strategy": "ddp"},
    "zero1, zero2": {"scale.strategy": "zero2"},
    "zero3": {"scale.strategy": "zero3"},
    "fsdp": {"scale.strategy": "fsdp"},
    "padding_free": {"data.padding_free": True},
    "packing": {"data.packing": True},
    "gradient_checkpointing": {"train.gradient_checkpointing": True},
}


def schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors: `# yaml-language-server: $schema=recipe.schema.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(mode="validation")}


def recipe_page() -> str:
    """docs/recipe.md: every key with what it may hold, its default and its meaning."""
    lines = [
        "# The recipe, key by key",
        GENERATED,
        "One YAML file serves every verb. Only `model.base` and `data.train` are required, and each key can be given on"
        " the command line too: `rayft train recipe.yaml train.learning_rate=1e-4`. `rayft recipe show RECIPE` prints"
        " the resolved recipe and who decided each value.",
        "Files and overrides are YAML 1.2: `1e-4` is a number, `no` is text. Relative paths are taken against the"
        " working directory.",
    ]
    for prefix, section in sections():
        lines.append(f"## {prefix or 'Top level'}")
        if section.__doc__ and section is not Recipe and not section.__doc__.startswith("A part of the recipe"):
            lines.append(section.__doc__.strip())
        rows = []
        for name, field in section.model_fields.items():
            words = re.sub(r"section \(.*?\)", "section", allowed(field))
            rows.append((f"`{name}`", _cell(words), f"`{default(field)}`", _cell(field.description or "")))
        lines.append(_table(("key", "allowed", "default", "meaning"), rows))
    lines += [
        "## Arguments that do not pass through",
        "`train.trainer_args` takes any other field of `transformers.TrainingArguments`, `adapter.peft_args` any other"
        " argument of the method's PEFT config. These are refused, because they would break a promise:",
        _table(("field", "why"), ((f"`{name}`", _cell(why)) for name, why in {**REFUSED, **PEFT_REFUSED}.items())),
    ]
    return _page(lines)


def compatibility_page() -> str:
    """docs/compatibility.md: the matrices, and every row of the table with its reason."""
    refused = [row for row in TABLE if row.verdict == "refused"]
    open_rows = [row for row in TABLE if row.verdict == "unverified"]
    matrix = []
    for method, facts in METHODS.items():
        cells = [_verdict({**facts, **column}, refused, open_rows) for column in COLUMNS.values()]
        matrix.append((method, *cells))
    virtual = ", ".join(f"`{method}`" for method in VIRTUAL_TOKEN_METHODS)
    return _page(
        [
            "# What goes together",
            GENERATED,
            "A recipe is checked against this table before anything starts. A number names the reason; `gpu` means"
            " that it should work, but no test of ours has run it on a GPU: unverified.",
            _table(("method", *COLUMNS), matrix),
            f"The methods {virtual} have `data.padding_free: false` by default.",
            "## Refused",
            _table(
                ("", "combination", "why", "instead"),
                (
                    (str(number), _conditions(row.when), _cell(row.reason), _cell(row.instead))
                    for number, row in enumerate(refused, start=1)
                ),
            ),
            "## Unverified on GPU",
            _table(("combination", "note"), ((_conditions(row.when), _cell(row.reason)) for row in open_rows)),
            "## Keys that a method does not have",
            "Giving one of them another value than its default is refused, since it would change nothing.",
            _table(
                ("`adapter.method`", "no such setting"),
                ((method, ", ".join(f"`{key}`" for key in names)) for method, names in UNUSED.items()),
            ),
        ]
    )


def synonyms_page() -> str:
    """docs/synonyms.md: other tools' names for our keys."""
    rows = (
        (f"`{entry.name}`", ", ".join(entry.used_by), f"`{entry.here}`" if entry.here else "none", _cell(entry.note))
        for entry in sorted(SYNONYMS, key=lambda entry: entry.name)
    )
    return _page(
        [
            "# Coming from another tool",
            GENERATED,
            "A recipe with one of these names is refused with the answer of this table.",
            _table(("their name", "used by", "here", "note"), rows),
        ]
    )


def files() -> dict[str, str]:
    """Path in the repository -> text, for everything that is generated."""
    return {
        "docs/recipe.md": recipe_page(),
        "docs/compatibility.md": compatibility_page(),
        "docs/synonyms.md": synonyms_page(),
        "examples/recipes/recipe.schema.json": json.dumps(schema(), indent=2) + "\n",
    }


def _verdict(facts: Mapping[str, Any], refused: list[Row], open_rows: list[Row]) -> str:
    numbers = [str(number) for number, row in enumerate(refused, start=1) if row.applies(facts)]
    if numbers:
        return f"no ({', '.join(numbers)})"
    return "gpu" if any(row.applies(facts) for row in open_rows) else "yes"


def _conditions(when: Mapping[str, Condition]) -> str:
    return ", ".join(f"`{key}`{_condition(condition)}" for key, condition in when.items())


def _condition(condition: Condition) -> str:
    if condition in (SET, NOT_SET):
        return f" {condition}"
    values = condition if isinstance(condition, tuple) else (condition,)
    return " = " + " or ".join(value if isinstance(value, str) else json.dumps(value) for value in values)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for path, text in files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
        print(folder / path)


if __name__ == "__main__":
    main()
