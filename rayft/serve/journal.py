"""What a server writes down: numbers about each request, and, where it is asked for, texts."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

REQUESTS = "requests.jsonl"
TEXTS = "texts.jsonl"
_DAY = 86400.0


class Journal:
    """A JSON-lines file that is set aside when it is large: as `requests.jsonl.1`, that one as `.2`, and so on."""

    def __init__(self, file: Path, largest: int = 64 * 2**20, kept: int = 4) -> None:
        """largest: bytes of one file. kept: number of files beside the current one."""
        self.file, self.largest, self.kept = file, largest, kept
        file.parent.mkdir(parents=True, exist_ok=True)
        self._open = self._opened()
        if self._open.tell() and file.read_bytes()[-1:] != b"\n":
            self._open.write("\n")  # after a line that a kill tore

    def append(self, line: Mapping[str, Any]) -> None:
        self._open.write(json.dumps(line) + "\n")
        self._open.flush()
        if self._open.tell() >= self.largest:
            self._open.close()
            for number in range(self.kept - 1, 0, -1):
                if self._older(number).exists():
                    self._older(number).replace(self._older(number + 1))
            self.file.replace(self._older(1))
            self._open = self._opened()

    def tail(self, most: int) -> list[dict[str, Any]]:
        """The last lines of the current file, oldest first; one that a kill tore is left out."""
        with open(self.file, encoding="utf-8") as file:
            lines = deque(file, maxlen=most)
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def _older(self, number: int) -> Path:
        return self.file.with_name(f"{self.file.name}.{number}")

    def _opened(self) -> IO[str]:
        return open(self.file, "a", encoding="utf-8", opener=_private)


class Texts:
    """Prompts and answers, each kept for a number of days and not longer."""

    def __init__(self, file: Path, days: float, clock: Callable[[], float] = time.time) -> None:
        """clock: seconds since the epoch."""
        self.file, self.days, self.clock = file, days, clock
        file.parent.mkdir(parents=True, exist_ok=True)
        self._every = min(3600.0, days * _DAY / 10)
        """Seconds between two looks for what is too old: what is kept for an hour shall not stay for two."""
        self._forget()

    def append(self, line: Mapping[str, Any]) -> None:
        """line: with its `time`."""
        if self.clock() - self._looked >= self._every:
            self._forget()
        with open(self.file, "a", encoding="utf-8", opener=_private) as file:
            file.write(json.dumps(line) + "\n")

    def _forget(self) -> None:
        self._looked = self.clock()
        if not self.file.exists():
            return
        oldest = self._looked - (self.days * _DAY - self._every)
        rest = self.file.with_name(f".{self.file.name}.rest")
        with open(self.file, encoding="utf-8") as old, open(rest, "w", encoding="utf-8", opener=_private) as new:
            for line in old:
                if line.endswith("\n") and json.loads(line)["time"] >= oldest:  # else torn by a kill
                    new.write(line)
        rest.replace(self.file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
