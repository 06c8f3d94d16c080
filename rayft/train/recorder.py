"""The recorder: the one place where a run's scalars arrive, and from where the progress display reads them.

The driver starts it as a Ray actor on its own node (or keeps it in its own process with `scale.workers: 0`), so it
outlives every worker. Rank 0 of the training workers logs into it. After a retry the new workers call `rewind` with
the step of their checkpoint: what came after it is dropped and will be logged again, so a step stands in
`metrics.jsonl` once, whatever happened on the way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from rayft.runs.lines import Lines, plain
from rayft.runs.metrics import MetricsLog, Row

Event = dict[str, Any]
"""Something that happened: `kind`, `time` (Unix seconds), then its facts."""


class Recorder:
    """Collects rows, events and samples of one run; answers the progress display; carries the stop flag.

    Every method is cheap and returns plain data; workers wait for the answer of `should_stop` only.
    """

    def __init__(self, metrics: MetricsLog, events: Lines, clock: Callable[[], float] = time.time) -> None:
        """A resumed run continues what an earlier driver left in its files."""
        self._metrics, self._file, self._clock = metrics, events, clock
        self._lock = threading.RLock()  # in-process runs log in one thread and are watched from another
        self._cursor = 0
        self._changed = {row["step"]: self._next() for row in metrics.rows()}  # step -> cursor of its last change
        self._events: list[tuple[int, Event]] = [(self._next(), event) for event in events.read()]
        self._stop = False
        self._history = self._cursor

    def log(self, row: Row) -> None:
        """Keep the scalars of `row["step"]`.

        Training and evaluation scalars of one step (`kind` "train" or "eval") have different names and end in one
        row; a scalar that is there already is replaced.
        """
        with self._lock:
            self._metrics.append({name: value for name, value in row.items() if name != "kind"})
            self._changed[int(row["step"])] = self._next()

    def rewind(self, step: int, reason: str = "") -> None:
        """A new attempt starts at the checkpoint of `step` (0 = from scratch): drop every row beyond it.

        Call it once per attempt except the very first. The restart is kept as an event with `lost_steps`, the number
        of optimiser steps that have to be done again as far as they were logged.
        """
        with self._lock:
            lost = max(0, self._metrics.last - step)
            self._metrics.rewind(step)
            self.event("restart", step=step, reason=reason, lost_steps=lost)

    def started(self, *, step: int, attempt: int, reason: str = "", **facts: Any) -> None:
        """Workers begin at `step`: for the first time, in a new attempt, or in one that Ray has begun anew because
        the number of workers changes."""
        with self._lock:
            before = [event["attempt"] for _, event in self._events if event["kind"] == "started"]
            if before and attempt == before[-1]:
                reason = "another number of workers"
            if before or reason:
                self.rewind(step, reason)
            self.event("started", step=step, attempt=attempt, **facts)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Generations of one evaluation: mappings with `prompt`, `text` and, where known, `reference`."""
        self.event("samples", step=step, samples=samples)

    def event(self, kind: str, **facts: Any) -> None:
        """Something worth a line in `events.jsonl`: started, failure, restart, preemption, divergence, warning, ..."""
        with self._lock:
            event: Event = {"kind": kind, "time": self._clock()} | {name: plain(value) for name, value in facts.items()}
            self._events.append((self._next(), event))
            self._file.append(event)

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
                "step": self._metrics.last,
                "rows": [row for row in self._metrics.rows() if self._changed[row["step"]] > since],
                "events": [event for cursor, event in self._events if cursor > max(since, self._history)],
                "restarts": sum(event["kind"] == "restart" for _, event in self._events),
                "stop": self._stop,
            }

    def rows(self) -> list[Row]:
        """All rows, by step."""
        return self._metrics.rows()

    def events(self) -> list[Event]:
        """All events, in the order in which they happened."""
        return [event for _, event in self._events]

    def flush(self) -> None:
        """Upload what is still only on this machine, where the run lies in a bucket."""
        with self._lock:
            self._metrics.flush()
            self._file.flush()

    def _next(self) -> int:
        self._cursor += 1
        return self._cursor
