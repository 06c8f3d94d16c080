"""A federation on the driver's screen: one live table on a terminal, a line per round in a log file."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from rayft.config.federate import Federate

ROWS = 15
"""Rounds that the table shows, the latest ones."""
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("round", "round", "d"),
    ("clients", "clients", "d"),
    ("loss", "loss", ".4f"),
    ("validation_loss", "validation", ".4f"),
    ("federated_loss", "clients' loss", ".4f"),
    ("gap", "gap", ".1e"),
    ("epsilon", "epsilon", ".3f"),
    ("mb_up", "MB up", ".2f"),
    ("mb_down", "MB down", ".2f"),
    ("seconds", "seconds", ".1f"),
)
"""Key of the row, heading, format. A column that no round has is not shown."""
TOLD = {"client_failed": "client {client} failed in round {round}: {reason}", "worker_died": "{reason}",
        "late": "round {round} did not wait for clients {clients}"}  # fmt: skip


class Display:
    """Shows rounds as they end. `quiet` shows nothing at all."""

    def __init__(
        self, title: str, federate: Federate, population: int, console: Console | None = None, *, quiet: bool = False
    ) -> None:
        self.title = f"{title}: {federate.strategy}, {federate.method}, {population} clients"
        self.rounds, self.quiet = federate.rounds, quiet
        self.console = console or Console()
        self._rows: list[Mapping[str, Any]] = []
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if not self.quiet and self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        elif not self.quiet:
            self.console.print(self.title, markup=False, highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def row(self, row: Mapping[str, Any]) -> None:
        """A round has ended."""
        self._rows = [*self._rows, row][-ROWS:]
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
        elif not self.quiet:
            self.console.print(self.line(row), markup=False, highlight=False, soft_wrap=True)

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Something went wrong and was survived."""
        if not self.quiet and kind in TOLD:
            text = escape(TOLD[kind].format(**facts))
            self.console.print(f"[yellow]{text}[/yellow]", highlight=False, soft_wrap=True)

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption=f"{self.rounds} rounds in all")
        shown = [column for column in COLUMNS if any(column[0] in row for row in self._rows)]
        for _, heading, _ in shown:
            table.add_column(heading, justify="right")
        for row in self._rows:
            table.add_row(*(_cell(row, key, form) for key, _, form in shown))
        return table

    def line(self, row: Mapping[str, Any]) -> str:
        """One round in plain text."""
        parts = [f"{heading} {_cell(row, key, form)}" for key, heading, form in COLUMNS[1:] if key in row]
        return f"round {row['round']}/{self.rounds}: " + ", ".join(parts)


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key == "clients":
        return f"{value}/{row.get('cohort', value)}"
    return format(value, form)
