"""A sweep on the driver's screen: one live table on a terminal, plain lines in a log file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape

from rayft.train.progress import shorten
from rayft.tune.objective import Objective, winners
from rayft.tune.pace import Pace
from rayft.tune.rows import TrialRow
from rayft.tune.table import line, render, summary
from rayft.tune.words import paths_of

Poll = Callable[[], Sequence[TrialRow]]
"""`Study.rows`, here or in its actor."""


class Display:
    """Shows a sweep until it ends. `quiet` shows nothing at all."""

    def __init__(
        self,
        title: str,
        objectives: Sequence[Objective],
        total: int,
        console: Console | None = None,
        *,
        quiet: bool = False,
        interval: float = 0.5,
        summary_every: float = 30.0,
    ) -> None:
        """`total`: trials that the sweep will have. `interval`: seconds between two polls. `summary_every`: seconds
        between two plain summaries."""
        self.title, self.objectives, self.total = title, tuple(objectives), total
        self.console = console or Console()
        self.quiet, self.interval, self.summary_every = quiet, interval, summary_every
        self._rows: Sequence[TrialRow] = ()
        self._pace = Pace(total)
        self._told: set[int] = set()
        self._lost = False

    def run(self, poll: Poll, stop: threading.Event) -> None:
        """Poll and show until `stop` is set; then once more, so that what stays on the screen is complete.

        Made for a thread of its own: no error of `poll` gets out, since the study's actor may be restarting.
        """
        if self.quiet:
            stop.wait()
        elif self.console.is_terminal:
            self._show_table(poll, stop)
        else:
            self._show_lines(poll, stop)

    def say(self, text: str, style: str = "yellow") -> None:
        """A line of its own, above the table on a terminal: out of memory, a lane that died. From any thread."""
        if not self.quiet:
            self.console.print(f"[{style}]{escape(text)}[/{style}]", highlight=False, soft_wrap=True)

    def _show_table(self, poll: Poll, stop: threading.Event) -> None:
        with Live(console=self.console, auto_refresh=False) as live:
            ended = False
            while not ended:
                ended = stop.wait(self.interval)
                self._read(poll)
                self._tell_failed()
                live.update(self._rendered(), refresh=True)

    def _rendered(self) -> RenderableType:
        return render(
            self._rows,
            self.objectives,
            title=self.title,
            total=self.total,
            width=self.console.width,
            elapsed=self._pace.elapsed,
            left=self._pace.seconds_left(self._rows),
        )

    def _show_lines(self, poll: Poll, stop: threading.Event) -> None:
        shown_at, ended = time.monotonic(), False
        while not ended:
            ended = stop.wait(self.interval)
            if self._read(poll):
                self._tell_ended()
            if self._rows and (ended or time.monotonic() - shown_at >= self.summary_every):
                left = self._pace.seconds_left(self._rows)
                self._plain(summary(self._rows, self.objectives, self.total, self._pace.elapsed, left))
                shown_at = time.monotonic()

    def _tell_failed(self) -> None:
        for row in self._rows:
            if row.state == "failed" and row.number not in self._told:
                self._told.add(row.number)
                self.say(shorten(f"trial {row.number} failed: {row.facts.get('reason', 'no reason known')}"), "red")

    def _tell_ended(self) -> None:
        """A line for each trial that has ended since the last time."""
        best = {row.number for row in winners(self._rows, self.objectives)}
        paths = paths_of(self._rows)
        for row in self._rows:
            if row.ended and row.number not in self._told:
                self._told.add(row.number)
                self._plain(line(row, self.objectives, paths, row.number in best))

    def _plain(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _read(self, poll: Poll) -> bool:
        try:
            self._rows = poll()
        except Exception as error:  # a display must never end a sweep, and Ray's errors have no common base
            if not self._lost:
                self.say(f"no news from the sweep: {type(error).__name__}")
            self._lost = True
            return False
        self._lost = False
        self._pace.read(self._rows)
        return True
