"""The progress of a run on the driver's screen: one bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

Poll = Callable[[int], dict[str, Any]]
"""`Recorder.snapshot`, here or in its actor."""


class State:
    """What the display knows, gathered from snapshots."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.step = 0
        self.restarts = 0
        self.latest: dict[str, Any] = {}
        self._times: list[tuple[int, float]] = []

    def read(self, snapshot: dict[str, Any]) -> list[dict[str, Any]]:
        """Take over rows; returns the new events, which are shown once."""
        self.restarts = snapshot["restarts"]
        for row in snapshot["rows"]:
            last = self._times[-1][0] if self._times else -1
            if row["step"] < last:
                self._times = []  # the run went back: the pace is measured anew
            if row["step"] != last:  # else its validation loss has come
                self._times = [*self._times[-50:], (row["step"], row["time"])]
            self.latest |= row
        self.step = max(0, snapshot["step"])
        return snapshot["events"]

    def seconds_left(self) -> float | None:
        """Time to the last step at the pace of the last 50 rows, evaluations and checkpoints included."""
        if len(self._times) < 2:
            return None
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return max(0.0, (end - begin) / (last - first) * (self.total_steps - self.step))

    def figures(self) -> list[str]:
        """Epoch, losses, pace, time left and restarts, as far as they are known."""
        row = self.latest
        parts = []
        if "epoch" in row:
            parts.append(f"epoch {row['epoch']:.2f}")
        if "loss" in row:
            parts.append(f"loss {_number(row['loss'])}")
        if "validation_loss" in row:
            parts.append(f"validation {_number(row['validation_loss'])}")
        if row.get("tokens_per_second"):
            parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        left = self.seconds_left()
        if left is not None and self.step < self.total_steps:
            parts.append(f"ETA {duration(left)}")
        if self.restarts:
            parts.append(f"restarts {self.restarts}")
        return parts

    def line(self) -> str:
        width = len(str(self.total_steps))
        return "  ".join([f"step {self.step:>{width}}/{self.total_steps}", *self.figures()])


class Progress:
    """Shows a run until it ends. `quiet` shows nothing at all."""

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        *,
        quiet: bool = False,
        interval: float = 0.5,
        line_every: float = 10.0,
    ) -> None:
        """`interval`: seconds between two polls. `line_every`: seconds between two plain lines."""
        self.console = console or Console()
        self.quiet = quiet
        self.interval = interval
        self.line_every = line_every
        self._state = State(total_steps)
        self._cursor = 0
        self._lost = False
        self._failed = False

    def run(self, poll: Poll, stop: threading.Event) -> None:
        """Poll and show until `stop` is set; then once more, so that the last line is complete.

        Made for a thread of its own: no error of `poll` gets out. The recorder's actor may be restarting or dead while
        the run goes on or is about to report why it ended.
        """
        if self.quiet:
            stop.wait()
        elif self.console.is_terminal:
            self._show_bar(poll, stop)
        else:
            self._show_lines(poll, stop)

    def _show_bar(self, poll: Poll, stop: threading.Event) -> None:
        columns = (BarColumn(bar_width=None), TextColumn("{task.description}", markup=False))
        with Bar(*columns, console=self.console, expand=True, refresh_per_second=4) as bar:
            task = bar.add_task("starting", total=self._state.total_steps)
            ended = False
            while not ended:
                ended = stop.wait(self.interval)
                for event in self._poll(poll):
                    self._show_event(event)
                description = self._state.line() if self._state.latest else "starting"
                bar.update(task, completed=self._state.step, description=description)

    def _show_lines(self, poll: Poll, stop: threading.Event) -> None:
        shown, shown_at = "", time.monotonic() - self.line_every
        ended = False
        while not ended:
            ended = stop.wait(self.interval)
            evaluated = self._state.latest.get("validation_loss")
            events = self._poll(poll)
            for event in events:
                self._show_event(event)
            new_evaluation = self._state.latest.get("validation_loss") != evaluated
            line = self._state.line()
            due = ended or new_evaluation or time.monotonic() - shown_at >= self.line_every
            if due and self._state.latest and line != shown:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
                shown, shown_at = line, time.monotonic()

    def _poll(self, poll: Poll) -> list[dict[str, Any]]:
        """New events, none where the recorder does not answer."""
        try:
            snapshot = poll(self._cursor)
            if snapshot["cursor"] < self._cursor:  # the recorder was restarted and counts anew
                snapshot = poll(0)
        except Exception as error:  # a display must never end a run, and Ray's errors have no common base
            if not self._lost:
                self._say(f"no news from the run: {type(error).__name__}", "yellow")
            self._lost = True
            return []
        self._lost = False
        self._cursor = snapshot["cursor"]
        return self._state.read(snapshot)

    def _show_event(self, event: dict[str, Any]) -> None:
        step = event.get("step")
        where = f" at step {step}" if step is not None and step >= 0 else ""
        match event["kind"]:
            case "samples":
                self._show_samples(event)
            case "restart":
                lost = event.get("lost_steps", 0)
                again = f", {lost} step{'s' if lost != 1 else ''} to do again" if lost else ""
                reason = f": {event['reason']}" if event.get("reason") else ""
                self._say(f"restart at step {step}{again}{reason}", "yellow")
            case "divergence":
                self._say(f"diverged at step {step}: {event.get('evidence', '')}", "red")
            case "warning":
                self._say(f"warning{where}: {event.get('evidence') or event.get('message', '')}", "yellow")
            case "started":
                self._failed = False
                attempt = f"attempt {event['attempt'] + 1}: " if event["attempt"] else ""
                workers = f"{event['workers']} worker{'s' if event['workers'] != 1 else ''}"
                batch = f"{event['micro_batch_size']} examples at a time in {event['dtype']}"
                parameters = f"{event['trainable_parameters']:,} of {event['total_parameters']:,} parameters trained"
                self._say(f"{attempt}{workers}, {batch}, {parameters}", "dim")
            case "failure" if not self._failed:  # the other ranks' failures are echoes of the first
                self._failed = True
                what = {"oom": "out of memory", "diverged": "stopped"}.get(event["cause"], "failed")
                self._say(f"{what}{where}: {shorten(event['detail'])}", "red")
            case "preemption":
                self._say(f"preemption notice at step {step}: saving, then going on", "yellow")
            case "early_stopping":
                self._say(f"early stopping at step {step}: the validation loss no longer improves", "cyan")

    def _show_samples(self, event: dict[str, Any]) -> None:
        self._say(f"samples at step {event['step']}", "cyan")
        for sample in event["samples"]:
            for label, name in (("asked", "prompt"), ("answer", "text"), ("wanted", "reference")):
                if sample.get(name):
                    self._line(f"  [dim]{label:>6}[/dim]  {escape(shorten(sample[name]))}")

    def _say(self, text: str, style: str) -> None:
        self._line(f"[{style}]{escape(text)}[/{style}]")

    def _line(self, markup: str) -> None:
        self.console.print(markup, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """41s, 3m20s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def shorten(text: str, length: int = 160) -> str:
    """One line; the end is what counts in a prompt and the beginning in an answer, so the middle goes."""
    line = " ".join(text.split())
    half = (length - 3) // 2
    return line if len(line) <= length else f"{line[:half]} … {line[-half:]}"


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
