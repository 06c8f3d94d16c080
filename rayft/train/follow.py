"""What a run's recorder hears, passed on to somebody who may end the run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from rayft.train.context import Recording

if TYPE_CHECKING:
    from rayft.train.driver import Watcher


class Follower:
    """Polls until `ended` is set, and once more after that. The watcher hears of each step once."""

    def __init__(self, watcher: Watcher, recording: Recording, scalar: str, interval: float = 0.2) -> None:
        """scalar: rows that have it are passed on. interval: seconds between two polls."""
        self.watcher, self.recording, self.scalar, self.interval = watcher, recording, scalar, interval
        self.ended = threading.Event()
        self.error: Exception | None = None
        self._cursor = 0
        self._step = -1
        self._stopped = False

    def run(self) -> None:
        last = False
        while not last and self.error is None:
            last = self.ended.wait(self.interval)
            try:
                self._poll()
            except Exception as error:  # the watcher's, of any kind: the run ends, and its driver raises it
                self.error = error
                self.recording.tell("request_stop")

    def _poll(self) -> None:
        snapshot = self.recording.ask("snapshot", self._cursor)
        self._cursor = snapshot["cursor"]
        for event in snapshot["events"]:
            if event["kind"] == "started":
                self.watcher.begun(event["total_steps"], event["trainable_parameters"])
        for row in snapshot["rows"]:
            if row.get(self.scalar) is not None and row["step"] > self._step and not self._stopped:
                self._step = row["step"]
                self._stopped = self.watcher.evaluated(row)
        if self._stopped:
            self.recording.tell("request_stop")
