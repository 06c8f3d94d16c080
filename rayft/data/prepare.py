"""`prepare`: from the recipe's sources to a folder of rendered, truncated, split and packed examples.

Two passes keep memory small: all rows are rendered to one Arrow file, then each split is gathered from its memory map.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from rayft.config.data import Data, Source
from rayft.config.recipe import Recipe
from rayft.data import function as row_function
from rayft.data.examples import Examples, Writer
from rayft.data.files import fingerprint
from rayft.data.ingest import COLUMNS, Counts, ingest, nothing_supervised
from rayft.data.prepared import STATS, Prepared
from rayft.data.render import Renderer, chat_template
from rayft.data.sources import source_name, source_names
from rayft.data.splits import split, write_prompts, write_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Part of the hash. Raise it with every change of this package that changes prepared examples."""


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cache: str) -> Prepared:
    """The recipe's examples, rendered once and kept in ``<cache>/<hash>``; a second call finds them there.

    The hash is over everything that decides the result: file contents, the data section, objective, seed, tokenizer and
    chat template. Two processes may ask at once: one works, the other waits. Raises UsageError R201 to R215.
    """
    identity = _identity(recipe, tokenizer)
    folder = Path(os.path.abspath(cache), identity)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / STATS).exists():
            unfinished = folder.with_name(f".{identity}")
            for leftover in (unfinished, folder):  # of a process that died
                shutil.rmtree(leftover, ignore_errors=True)
            unfinished.mkdir()
            try:
                _build(recipe, tokenizer, unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return Prepared(str(folder), identity)


def _build(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    data = recipe.data
    renderer = Renderer(tokenizer, data, recipe.train.objective)
    label = _label(recipe)
    rows, counts = _render(data.train, data, renderer, folder / "rows.arrow", label)
    chosen, held_out = split([count.examples for count in counts], data, recipe.seed)
    parts = {"train": write_split(folder, "train", rows, chosen, data, labelled=label is not None)}
    stats = {"sources": {count.name: count.plain() for count in counts}}
    if isinstance(data.validation, list):
        rows, more = _render(data.validation, data, renderer, folder / "validation_rows.arrow")
        held_out = list(range(len(rows)))
        stats["validation_sources"] = {count.name: count.plain() for count in more}
        counts = counts + more
    if held_out:
        parts["validation"] = write_split(folder, "validation", rows, held_out, data)
        write_prompts(folder, rows, held_out, tokenizer)
    for name in ("rows.arrow", "validation_rows.arrow"):
        (folder / name).unlink(missing_ok=True)
    text = json.dumps({**_total(counts), **stats, **parts}, indent=1, ensure_ascii=False)
    (folder / STATS).write_text(text, encoding="utf-8")


def _label(recipe: Recipe) -> str | None:
    """The column that a federation splits the training rows by."""
    return recipe.federate.label if recipe.federate is not None else None


def _render(
    sources: Sequence[Source], data: Data, renderer: Renderer, path: Path, label: str | None = None
) -> tuple[Examples, list[Counts]]:
    """All examples of the sources with something to train on, in order. Raises UsageError R213 when there are none."""
    with Writer(path, COLUMNS if label is None else [*COLUMNS, "label"]) as writer:
        counts = [
            ingest(source, name, data, renderer, writer, label)
            for source, name in zip(sources, source_names(sources), strict=True)
        ]
    if not any(count.examples for count in counts):
        raise nothing_supervised(counts, data)
    return Examples(path), counts


def _total(counts: Sequence[Counts]) -> dict[str, Any]:
    total = Counts("")
    for count in counts:
        for name, value in vars(count).items():
            if name != "name":
                setattr(total, name, getattr(total, name) + value)
    total.zero_supervised_rows = total.zero_supervised_rows[:5]
    plain = total.plain()
    del plain["name"]
    return plain


def _identity(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    data = recipe.data
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    settings = {"train", "validation", "padding_free", "chat_template", "function"}  # below, or without influence
    own = data.validation if isinstance(data.validation, list) else None
    facts = {
        "version": VERSION,
        "seed": recipe.seed,
        "objective": recipe.train.objective,
        "data": data.model_dump(mode="json", exclude=settings),
        "train": [_source_facts(source) for source in data.train],
        "validation": data.validation if own is None else [_source_facts(source) for source in own],
        "function": row_function.digest(data.function) if data.function else None,
        "chat_template": chat_template(data) or tokenizer.chat_template,
        # The settings of padding and truncation are left by whoever used the tokenizer last.
        "tokenizer": {key: value for key, value in backend.items() if key not in ("padding", "truncation")},
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    if label := _label(recipe):
        facts["label"] = label
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _source_facts(source: Source) -> dict[str, Any]:
    settings = source.model_dump(mode="json", exclude={"path"})
    return {**settings, "name": source_name(source), "contents": fingerprint(source)}
