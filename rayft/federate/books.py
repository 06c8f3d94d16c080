"""Rounds on disk: what a round leaves is there whole or not at all, and a resumed run goes on from it bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rayft.config.federate import Federate
from rayft.errors import UsageError
from rayft.federate.messages import Server
from rayft.federate.privacy import Release
from rayft.runs.folder import RunFolder
from rayft.runs.lines import Lines, read_lines
from rayft.runs.storage import is_committed, locate

ROUNDS = "rounds"
LEDGER = "ledger.jsonl"
STATE = "server.pt"
FREE = ("evaluate", "communication_budget_mb", "preset")
"""Settings that may change when a run is resumed; also `rounds`, where no schedule depends on it."""


@dataclass
class Book:
    """A federation after some round."""

    server: Server
    kept: dict[int, int] = field(default_factory=dict)
    """Client -> round after which it kept its current state."""
    row: dict[str, Any] = field(default_factory=dict)
    """The line of metrics.jsonl."""
    best: tuple[int, float] | None = None
    """(round, loss) of the best evaluation."""
    tokens: int = 0
    megabytes: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    """The section `federate` that it was made with."""

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "server": self.server.plain(), "best": list(self.best) if self.best else None}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Book:
        best = plain["best"]
        return cls(**{**plain, "server": Server.of(plain["server"]), "best": (best[0], best[1]) if best else None})


class Books:
    """The rounds of a run's folder, and the ledger of what was released."""

    def __init__(self, folder: RunFolder, kind: str = "adapter") -> None:
        """kind: what a round deploys, and the name of its folder: adapter or model."""
        self.folder, self.kind = folder, kind
        self._ledger = Lines(folder.location / LEDGER, folder.scratch)

    def rounds(self) -> list[int]:
        """Rounds that are whole, in order."""
        return rounds_of(self.folder)

    def last(self) -> Book | None:
        """The last whole round."""
        found = self.rounds()
        return self.read(found[-1]) if found else None

    def read(self, number: int) -> Book:
        return read_book(self.folder, number)

    def commit(self, book: Book, export: Callable[[Path], None]) -> None:
        """Write a round: the server's state and the weights as they are deployed, in one step; then its line of
        metrics.

        export: writes the adapter or model into a folder.
        """
        number = book.server.rounds
        with self.folder.writing(f"{ROUNDS}/{number}") as target:
            export(target / self.kind)
            buffer = io.BytesIO()
            torch.save(book.plain(), buffer)
            (target / STATE).write_bytes(buffer.getvalue())
        self.folder.append_metrics(book.row)

    def mend(self, book: Book | None) -> None:
        """After a kill: metrics.jsonl has the rounds that are whole, no more and no less."""
        log = self.folder.metrics_log()
        log.rewind(book.server.rounds if book else 0)
        if book is not None and book.row:
            log.append(book.row)

    def thin(self, keep: int | None, best: int | None) -> None:
        """Remove the oldest rounds but ``keep`` and the best one."""
        found = self.rounds()
        for number in found[:-keep] if keep else []:
            if number != best:
                (self.folder.location / ROUNDS / str(number)).remove()

    def forget(self, before: dict[int, int], after: dict[int, int]) -> None:
        """Remove clients' states that newer ones have replaced."""
        for client, number in before.items():
            if after.get(client) != number:
                (self.folder.location / "clients" / str(client) / f"{number}.pt").remove()

    # The ledger: written before a release, so that nothing that was released is ever forgotten

    def releases(self) -> list[Release]:
        return [Release(**line) for line in read_lines(self.folder.location / LEDGER)]

    def release(self, release: Release) -> None:
        self._ledger.append(vars(release))
        self._ledger.flush()


def rounds_of(folder: RunFolder) -> list[int]:
    found = (folder.location / ROUNDS).folders()
    return sorted(int(child.name) for child in found if child.name.isdecimal() and is_committed(child))


def read_book(folder: RunFolder, number: int) -> Book:
    """Raises UsageError R931 for a file that cannot be read."""
    file = folder.location / ROUNDS / str(number) / STATE
    try:
        return Book.of(torch.load(io.BytesIO(file.read()), weights_only=True))
    except Exception as error:  # torch raises whatever it meets in a damaged file
        raise UsageError(
            "R931",
            f"round {number} of run {folder.name!r} cannot be read: {error}",
            f"remove {locate(file.parent)}, and --resume goes on from the round before it",
        ) from error


def check_same(book: Book, federate: Federate, name: str) -> None:
    """Raises UsageError R930 when a run was begun with another strategy or other settings that decide its numbers."""
    now = federate.model_dump(mode="json")
    free = (*FREE, "rounds") if federate.lr_schedule == "constant" else FREE
    different = [
        f"{key}: {book.settings[key]!r} -> {now[key]!r}"
        for key in now
        if key not in free and key in book.settings and book.settings[key] != now[key]
    ]
    if different:
        listed = "\n  ".join(f"federate.{line}" for line in different)
        raise UsageError(
            "R930",
            f"the rounds of run {name!r} were made with other settings:\n  {listed}",
            "take the values back, or start another run with --new",
        )


def stripped(server: Server) -> Server:
    """Without what only the server needs."""
    return replace(server, moments={})
