"""What `prepare` leaves behind: a content-hashed folder of rendered examples, shared by runs that ask for the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rayft.data.examples import Examples

STATS = "stats.json"
"""Written last: a folder that has it is complete."""
PROMPTS = "prompts.jsonl"


@dataclass(frozen=True)
class Prepared:
    """A prepared data set. ``folder`` is ``<cache>/<hash>``; plain data, so it can be sent to workers."""

    folder: str
    hash: str

    def split(self, name: Literal["train", "validation"]) -> Examples | None:
        """The examples of a split (bins of them with packing); None where there is no validation data."""
        path = Path(self.folder, f"{name}.arrow")
        return Examples(path) if path.exists() else None

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Counts over all rows read (the fields of `rayft.data.ingest.Counts` and ``truncated_share``), the same per
        source under ``sources`` and ``validation_sources``, and under ``train`` and ``validation`` what a split holds
        (``examples``, ``tokens``, ``supervised_tokens``, with packing ``bins``).
        """
        return json.loads(Path(self.folder, STATS).read_text(encoding="utf-8"))

    def prompts(self, n: int | None = None) -> list[dict[str, Any]]:
        """The first ``n`` validation examples (all by default) as questions for generation.

        Each has ``prompt_ids`` (list of int: everything before the text of the last assistant turn, exactly the ids
        that the model sees before it in training), ``prompt`` (the same as text) and ``reference`` (the text of that
        turn without special tokens). Examples without an assistant turn or with a truncated one have no prompt.
        """
        path = Path(self.folder, PROMPTS)
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines[:n]]
