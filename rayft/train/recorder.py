"""The recorder: the one place where a run's scalars arrive, and from where the progress display reads them.

The driver starts it as a Ray actor on its own node (or keeps it in its own process with `scale.workers: 0`), so it
outlives every worker. Rank 0 of the training workers logs into it. After a retry the new workers call `rewind` with
the step of their checkpoint: what came after it is dropped and will be logged again, so a step stands in
`metrics.jsonl` once, whatever happened on the way.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rayft.errors import UsageError

Row = dict[str, Any]
"""One optimiser step: `step`, `time` (Unix seconds), `tokens` (real tokens so far), then scalars such as `loss`,
`grad_norm`, `learning_rate`, `validation_loss`. A number that is not finite stands there as None."""
Event = dict[str, Any]
"""Something that happened: `kind`, `time` (Unix seconds), then its facts."""


class Sink(Protocol):
    """Where rows and events are kept; `rayft.runs.folder.RunFolder` is one, `LocalSink` another."""

    def append_metrics(self, row: Row) -> None: ...

    def rewind_metrics(self, step: int) -> None: ...

    def read_metrics(self) -> list[Row]: ...

    def append_event(self, event: Event) -> None: ...

    def read_events(self) -> list[Event]: ...


class LocalSink:
    """`metrics.jsonl` and `events.jsonl` in a local folder."""

    def __init__(self, folder: str | Path) -> None:
        self._metrics = Path(folder) / "metrics.jsonl"
        self._events = Path(folder) / "events.jsonl"

    def append_metrics(self, row: Row) -> None:
        _append(self._metrics, row)

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows beyond `step`; the file is replaced at once, never half written."""
        kept = [row for row in read_lines(self._metrics) if row["step"] <= step]
        temporary = self._metrics.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self._metrics)

    def read_metrics(self) -> list[Row]:
        return read_lines(self._metrics)

    def append_event(self, event: Event) -> None:
        _append(self._events, event)

    def read_events(self) -> list[Event]:
        return read_lines(self._events)


class Recorder:
    """Collects rows, events and samples of one run; answers the progress display; carries the stop flag.

    Every method is cheap and returns plain data; workers wait for the answer of `should_stop` only.
    """

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.time) -> None:
        """Read what an earlier driver left in `sink`, so that a resumed run continues the same files."""
        self._sink = sink
        self._clock = clock
        self._lock = threading.RLock()  # in-process runs log in one thread and are watched from another
        self._rows: dict[int, Row] = {}
        self._changed: dict[int, int] = {}  # step -> cursor of its last change
        self._events: list[tuple[int, Event]] = []
        self._cursor = 0
        self._last = -1  # the last step of `_rows`
        self._stop = False
        for row in sorted(sink.read_metrics(), key=lambda row: row["step"]):
            self._put(row)
        for event in sink.read_events():
            self._events.append((self._next(), event))
        self._history = self._cursor

    def log(self, row: Row) -> None:
        """Keep the scalars of `row["step"]`.

        Training and evaluation scalars of one step (`kind` "train" or "eval") have different names and end in one
        row; a scalar that is there already is replaced.
        """
        with self._lock:
            step = int(row["step"])
            last = self._last
            known = self._rows.get(step, {})
            scalars = {name: _plain(value) for name, value in row.items() if name != "kind"}
            self._put({"step": step, "time": self._clock(), "tokens": 0, **known, **scalars})
            if step > last:
                self._sink.append_metrics(self._rows[step])
                return
            self._sink.rewind_metrics(step - 1)
            for later in sorted(self._rows):
                if later >= step:
                    self._sink.append_metrics(self._rows[later])

    def rewind(self, step: int, reason: str = "") -> None:
        """A new attempt starts at the checkpoint of `step` (0 = from scratch): drop every row beyond it.

        Call it once per attempt except the very first. The restart is kept as an event with `lost_steps`, the number
        of optimiser steps that have to be done again as far as they were logged.
        """
        with self._lock:
            last = self._last
            for beyond in [known for known in self._rows if known > step]:
                del self._rows[beyond], self._changed[beyond]
            self._last = max(self._rows, default=-1)
            self._sink.rewind_metrics(step)
            self.event("restart", step=step, reason=reason, lost_steps=max(0, last - step))

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Generations of one evaluation: mappings with `prompt`, `text` and, where known, `reference`."""
        self.event("samples", step=step, samples=samples)

    def event(self, kind: str, **facts: Any) -> None:
        """Something worth a line in `events.jsonl`: started, failure, restart, preemption, divergence, warning, ..."""
        with self._lock:
            plain = {name: _plain(value) for name, value in facts.items()}
            event: Event = {"kind": kind, "time": self._clock(), **plain}
            self._events.append((self._next(), event))
            self._sink.append_event(event)

    def request_stop(self) -> None:
        """Ask the workers to save at the next micro-step and to end."""
        self._stop = True

    def should_stop(self) -> bool:
        return self._stop

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """What changed after cursor `since`: {cursor, step (the last, -1 = none), rows (by step), events (in order),
        restarts (of the whole run), stop}. Events of an earlier driver were shown by it and are left out."""
        with self._lock:
            return {
                "cursor": self._cursor,
                "step": self._last,
                "rows": [self._rows[step] for step in sorted(self._rows) if self._changed[step] > since],
                "events": [event for cursor, event in self._events if cursor > max(since, self._history)],
                "restarts": sum(event["kind"] == "restart" for _, event in self._events),
                "stop": self._stop,
            }

    def rows(self) -> list[Row]:
        """All rows, by step."""
        return [self._rows[step] for step in sorted(self._rows)]

    def events(self) -> list[Event]:
        """All events, in the order in which they happened."""
        return [event for _, event in self._events]

    def _put(self, row: Row) -> None:
        self._rows[row["step"]] = row
        self._changed[row["step"]] = self._next()
        self._last = max(self._last, row["step"])

    def _next(self) -> int:
        self._cursor += 1
        return self._cursor


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] if there is none.

    A last line that was cut off by a kill is left out. Raises UsageError R630 for damage anywhere else.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UsageError(
                "R630",
                f"{path}, line {number}: not JSON ({error.msg}): {line[:80]!r}",
                "remove the damaged line; a resumed run writes the steps beyond its checkpoint again",
            ) from error
    return objects


def _append(path: Path, item: dict[str, Any]) -> None:
    """Add one line; a torn line that a killed process left at the end is cut off first."""
    data = (json.dumps(item) + "\n").encode()
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(data)


def _plain(value: Any) -> Any:
    """A JSON value: numpy and torch scalars as Python numbers, NaN and infinity as None."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
