"""JSON-lines files: one object per line, written by one process, read by anybody."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rayft.errors import UsageError
from rayft.runs.storage import Location, locate, write_atomic

_UPLOAD_SECONDS = 10.0


class Lines:
    """A JSON-lines file that this process writes.

    Buckets cannot append: there the file is kept in a folder of this machine and uploaded every few seconds.
    """

    def __init__(self, target: Location, scratch: Path) -> None:
        """scratch: a local folder for the file of a bucket."""
        self._target = target
        self._file = target.local if target.is_local else scratch / target.name
        if not target.is_local and target.is_file():
            write_atomic(self._file, target.read())
        self._uploaded = time.monotonic()

    def read(self) -> list[dict[str, Any]]:
        """See `read_lines`."""
        return read_lines(locate(self._file))

    def append(self, item: Mapping[str, Any]) -> None:
        """Add one line; a torn line that a killed process left at the end is cut off first."""
        data = (json.dumps(item) + "\n").encode()
        with open(self._file, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(data)  # one short write: a crash can cut only this line
        self._upload_now_and_then()

    def replace(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Write the whole file anew; it is replaced at once, never half written."""
        write_atomic(self._file, "".join(json.dumps(item) + "\n" for item in items))
        self._upload_now_and_then()

    def flush(self) -> None:
        """Upload what a bucket does not have yet."""
        self._uploaded = time.monotonic()
        if not self._target.is_local and self._file.exists():
            self._target.write(self._file.read_bytes())

    def _upload_now_and_then(self) -> None:
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.flush()


def read_lines(file: Location) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] if there is none.

    The end of a line that a kill cut off, or that somebody is writing at this moment, is left out. Raises UsageError
    R630 for damage anywhere else.
    """
    if not file.is_file():
        return []
    objects = []
    for number, line in enumerate(file.read().decode().split("\n")[:-1], start=1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                "R630",
                f"{file}, line {number}: not JSON ({error.msg}): {line[:80]!r}",
                "remove the damaged line; a resumed run writes the steps beyond its checkpoint again",
            ) from error
    return objects


def plain(value: Any) -> Any:
    """A JSON value: numpy and torch scalars as Python numbers; NaN and infinity, which JSON does not have, as None."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
