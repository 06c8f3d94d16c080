"""From all rendered rows to the training and the validation split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rayft.config.data import Data
from rayft.data.examples import Examples, Writer
from rayft.data.pack import pack, positions
from rayft.data.prepared import PROMPTS
from rayft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split(sizes: Sequence[int], data: Data, seed: int) -> tuple[list[int], list[int]]:
    """Which rows are trained on and which are held out, given the number of rows of each training source.

    Validation rows are drawn first and from all rows alike, then each source's rest is repeated or thinned by its
    weight: no row stands on both sides. A function of the arguments only. Raises UsageError R215.
    """
    rows = sum(sizes)
    held_out: list[int] = []
    if isinstance(data.validation, float):
        if rows < 2:
            raise UsageError(
                "R215", "data.validation: one example cannot be split in two", "give more data or validation: null"
            )
        count = min(max(1, round(data.validation * rows)), rows - 1)
        held_out = np.sort(np.random.default_rng([seed, 0]).permutation(rows)[:count]).tolist()
    chosen: list[int] = []
    start = 0
    for number, (source, size) in enumerate(zip(data.train, sizes, strict=True)):
        kept = np.setdiff1d(np.arange(start, start + size), held_out)
        chosen += _weighted(kept, source.weight, np.random.default_rng([seed, 1, number]))
        start += size
    return chosen, held_out


def write_split(
    folder: Path, name: str, rows: Examples, chosen: Sequence[int], data: Data, *, labelled: bool = False
) -> dict[str, int]:
    """Writes ``<name>.arrow`` with the chosen rows, packed into bins where asked for; returns what it holds.

    labelled: the rows have a column ``label``, which is kept.
    """
    supervised, sources = rows.column("supervised"), rows.column("source")
    lengths = rows.lengths[list(chosen)]
    counts = {
        "examples": len(chosen),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "supervised_tokens": sum(supervised[row] for row in chosen),
    }
    path = folder / f"{name}.arrow"
    if not data.packing:
        labels = rows.column("label") if labelled else None
        with Writer(path, ["input_ids", "loss_weights", "source", *(["label"] if labels else [])]) as writer:
            for row in chosen:
                writer.append(**rows[row], source=sources[row], **({"label": labels[row]} if labels else {}))
        return counts
    bins = pack(lengths, data.max_length)
    with Writer(path, ["input_ids", "loss_weights", "position_ids", "source"]) as writer:
        for members in bins:
            inside = [chosen[member] for member in members]
            examples = [rows[row] for row in inside]
            writer.append(
                input_ids=np.concatenate([example["input_ids"] for example in examples]),
                loss_weights=np.concatenate([example["loss_weights"] for example in examples]),
                position_ids=positions(lengths[members].tolist()),
                source=", ".join(sorted({sources[row] for row in inside})),
            )
    return {**counts, "bins": len(bins)}


def write_prompts(folder: Path, rows: Examples, chosen: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes what `Prepared.prompts` reads: per chosen row with a whole last answer the ids and text before the answer,
    and the text of the answer."""
    starts, ends = rows.column("answer_start"), rows.column("answer_end")
    with open(folder / PROMPTS, "w", encoding="utf-8") as file:
        for row in chosen:
            start, end = starts[row], ends[row]
            if start < 1:  # no answer, or nothing before it
                continue
            ids = rows[row]["input_ids"].tolist()
            prompt = {
                "prompt_ids": ids[:start],
                "prompt": tokenizer.decode(ids[:start]),
                "reference": tokenizer.decode(ids[start:end], skip_special_tokens=True),
            }
            file.write(json.dumps(prompt, ensure_ascii=False) + "\n")


def _weighted(rows: np.ndarray, weight: float, generator: np.random.Generator) -> list[int]:
    """``rows`` as often as ``weight`` says: whole copies, then a random part for its fraction; at least one row."""
    copies, part = int(weight), weight - int(weight)
    count = min(len(rows), max(round(part * len(rows)), 0 if copies else 1))
    return rows.tolist() * copies + np.sort(generator.permutation(rows)[:count]).tolist()
