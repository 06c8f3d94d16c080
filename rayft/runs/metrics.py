"""``metrics.jsonl``: one JSON object per line, in the order of ``step``; a step stands there once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rayft.runs.lines import Lines, plain
from rayft.runs.storage import Location

Row = dict[str, Any]
"""One optimiser step: `step`, `time` (Unix seconds), `tokens` (real tokens so far), then scalars such as `loss`,
`grad_norm`, `learning_rate`, `validation_loss`. A number that is not finite stands there as None."""


class MetricsLog:
    """The rows of a run, and the file that holds them."""

    def __init__(self, target: Location, scratch: Path, clock: Callable[[], float] = time.time) -> None:
        """Continue what an earlier process left. `scratch`: see `Lines`."""
        self._lines, self._clock = Lines(target, scratch), clock
        self._rows: dict[int, Row] = {row["step"]: row for row in self._lines.read()}
        self.last = max(self._rows, default=-1)
        """The last step, -1 = none."""

    def rows(self) -> list[Row]:
        """All rows, by step."""
        return [self._rows[step] for step in sorted(self._rows)]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add scalars of an optimiser step: ``{"step": 12, "loss": 0.7, ...}``.

        What comes later for a step (its validation loss) joins its row; a scalar that is there already is replaced.
        """
        step = int(row["step"])
        first = {"step": step, "time": round(self._clock(), 3), "tokens": 0}
        self._rows[step] = first | self._rows.get(step, {}) | {name: plain(value) for name, value in row.items()}
        if step > self.last:
            self.last = step
            self._lines.append(self._rows[step])
        else:
            self._lines.replace(self.rows())

    def rewind(self, step: int) -> None:
        """Drop the rows beyond ``step``: the run goes on from the checkpoint of that step."""
        if step < self.last:
            self._rows = {known: row for known, row in self._rows.items() if known <= step}
            self.last = max(self._rows, default=-1)
            self._lines.replace(self.rows())

    def flush(self) -> None:
        """Upload the rows that a bucket does not have yet."""
        self._lines.flush()
