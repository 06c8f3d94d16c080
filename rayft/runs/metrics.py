"""``metrics.jsonl``: one JSON object per line, in the order of ``step``; a step stands there once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayft.runs.storage import Location, write_atomic

_UPLOAD_SECONDS = 10.0


class MetricsLog:
    """Rows of metrics in a local file; where the run lies in a bucket the file is uploaded every few seconds.

    A second row of a step adds to the first one (training loss, then validation loss). A row of an earlier step means
    that the run was taken up again there: later rows are dropped first, so that no step is counted twice.
    """

    def __init__(self, target: Location, scratch: Path) -> None:
        self._target = target
        self._file = target.local if target.is_local else scratch / target.name
        if not target.is_local and target.is_file():
            write_atomic(self._file, target.read())
        self._uploaded = time.monotonic()
        self._rows = self._read()

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self._rows]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add scalars of an optimiser step: ``{"step": 12, "loss": 0.7, ...}``.

        NaN and infinity become null: JSON has neither.
        """
        clean = {key: _json_value(value) for key, value in row.items()}
        step = int(clean["step"])
        last = self._rows[-1]["step"] if self._rows else -1
        if step > last:
            self._rows.append({"step": step, "time": round(time.time(), 3), **clean})
            with self._file.open("a") as file:  # one short write: a crash can cut only this line
                file.write(json.dumps(self._rows[-1]) + "\n")
        else:
            self._rows = [former for former in self._rows if former["step"] <= step]
            if self._rows and self._rows[-1]["step"] == step:
                self._rows[-1] |= clean
            else:
                self._rows.append({"step": step, "time": round(time.time(), 3), **clean})
            self._rewrite()
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.flush()

    def rewind(self, step: int) -> None:
        """Drop the rows beyond ``step``: the run goes on from the checkpoint of that step."""
        kept = [row for row in self._rows if row["step"] <= step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._rewrite()

    def flush(self) -> None:
        """Upload the file when the run lies in a bucket."""
        self._uploaded = time.monotonic()
        if not self._target.is_local and self._file.exists():
            self._target.write(self._file.read_bytes())

    def _rewrite(self) -> None:
        write_atomic(self._file, "".join(json.dumps(row) + "\n" for row in self._rows))

    def _read(self) -> list[dict[str, Any]]:
        """The file's rows. The last line, if a crash cut it off, is removed from the file too."""
        if not self._file.exists():
            return []
        lines = self._file.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            write_atomic(self._file, "".join(lines))
        return [json.loads(line) for line in lines]


def read_rows(file: Location) -> list[dict[str, Any]]:
    """The rows of a metrics file that somebody else may be writing; a line that is not whole yet is left out."""
    if not file.is_file():
        return []
    lines = file.read().decode().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
