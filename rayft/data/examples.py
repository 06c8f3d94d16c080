"""Rendered examples on disk: an Arrow IPC file that is written in batches and read through a memory map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

BATCH_ROWS = 1000
_TYPES = {
    "input_ids": pa.list_(pa.int32()),
    "loss_weights": pa.list_(pa.float32()),
    "position_ids": pa.list_(pa.int32()),
    "supervised": pa.int32(),
    "source": pa.string(),
    "label": pa.string(),
    "answer_start": pa.int32(),
    "answer_end": pa.int32(),
}


class Examples:
    """Examples in the order of the file. ``examples[i]`` reads one row; ``examples[-1]`` is the filler row.

    A row is ``{"input_ids": int32[L], "loss_weights": float32[L]}``, with packing also ``"position_ids": int32[L]``.
    The arrays are read-only views of the file. The filler row is one token of weight 0. Pickles as its path.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        table = pa.ipc.open_file(pa.memory_map(self.path)).read_all()
        self._table = table
        batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in batches])
        self._offsets = [batch.column("input_ids").offsets.to_numpy() for batch in batches]
        names = [name for name in ("input_ids", "loss_weights", "position_ids") if name in table.column_names]
        self._values = [{name: batch.column(name).values.to_numpy() for name in names} for batch in batches]

    def __reduce__(self) -> tuple[type[Examples], tuple[str]]:
        return Examples, (self.path,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == -1:
            return {"input_ids": np.zeros(1, np.int32), "loss_weights": np.zeros(1, np.float32)}
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        begin, end = self._offsets[batch][index - self._starts[batch] :][:2]
        return {name: values[begin:end] for name, values in self._values[batch].items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32[n]: tokens per example."""
        counts = [np.diff(offsets) for offsets in self._offsets]
        return np.concatenate([np.zeros(0, np.int32), *counts]).astype(np.int32)

    @cached_property
    def weight_sums(self) -> np.ndarray:
        """float64[n]: sum of the loss weights of each example."""
        sums = [
            np.add.reduceat(values["loss_weights"].astype(np.float64), offsets[:-1])
            for values, offsets in zip(self._values, self._offsets, strict=True)
        ]
        return np.concatenate([np.zeros(0), *sums])

    def column(self, name: str) -> list[Any]:
        """A column with one value per example, such as ``source``."""
        return self._table.column(name).to_pylist()


class Selection(Examples):
    """Some of the examples of a file, in the given order. Shares the open file; pickles as path and indices."""

    def __init__(self, whole: Examples | str | Path, indices: Sequence[int] | np.ndarray) -> None:
        self.whole = whole if isinstance(whole, Examples) else Examples(whole)
        self.path = self.whole.path
        self.indices = np.asarray(indices, dtype=np.int64)

    def __reduce__(self) -> Any:
        return Selection, (self.path, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index != -1 and not 0 <= index < len(self):
            raise IndexError(index)
        return self.whole[-1 if index == -1 else int(self.indices[index])]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32[n]: tokens per example."""
        return np.asarray(self.whole.lengths[self.indices])

    @cached_property
    def weight_sums(self) -> np.ndarray:
        """float64[n]: sum of the loss weights of each example."""
        return np.asarray(self.whole.weight_sums[self.indices])

    def column(self, name: str) -> list[Any]:
        """A column with one value per example, such as ``source``."""
        values = self.whole.column(name)
        return [values[index] for index in self.indices]


class Writer:
    """Writes rows with the given columns to ``path``, at most ``BATCH_ROWS`` of them in memory."""

    def __init__(self, path: str | Path, columns: list[str]) -> None:
        self._schema = pa.schema([(name, _TYPES[name]) for name in columns])
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def append(self, **row: Any) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = [pa.array([row[field.name] for row in self._rows], field.type) for field in self._schema]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._rows:
            self._flush()
        self._writer.close()
        self._file.close()
