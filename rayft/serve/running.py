"""The servers that were started from this machine: where they are, whether they answer, how they are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayft.errors import RunFailed, UsageError
from rayft.home import home
from rayft.runs.storage import locate, write_atomic
from rayft.serve.driver import Server


@dataclass(frozen=True)
class Record:
    """What is written down about a server while it runs."""

    name: str
    url: str
    models: tuple[str, ...]
    folder: str
    ray_address: str
    """`local` = a cluster of its own that ends with its process."""
    pid: int
    """Of the process that started it."""
    started: float

    @property
    def answers(self) -> bool:
        return self.health() == "ok"

    def health(self) -> str:
        """`ok`, or what is the matter."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return "ok"
        except urllib.error.HTTPError as error:
            return f"not ready ({error.code})"
        except (urllib.error.URLError, OSError):
            return "does not answer"


def note(server: Server) -> Record:
    """Write down a server that has started."""
    facts: dict[str, Any] = {**asdict(server), "pid": os.getpid(), "started": time.time()}
    write_atomic(locate(str(_file(server.name))), json.dumps(facts, indent=2).encode())
    return Record(**facts)


def forget(name: str) -> None:
    _file(name).unlink(missing_ok=True)


def records() -> list[Record]:
    """Servers that were noted, also those that do not answer any more."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        facts = json.loads(file.read_text())
        found.append(Record(**{**facts, "models": tuple(facts["models"])}))
    return found


def stop(name: str | None = None, patience: float = 60) -> list[str]:
    """End a server, or the only one. Returns the names of what was ended; records of dead ones are cleared.

    Raises:
        UsageError: R865, there is no such server, or there are several and none was named.
    """
    there = records()
    known = ", ".join(record.name for record in there) or "none"
    chosen = [record for record in there if name in (None, record.name)]
    if not chosen:
        raise UsageError("R865", f"no server {name or ''} was started from here".replace("  ", " "), f"known: {known}")
    if name is None and len(chosen) > 1:
        raise UsageError("R865", "several servers run", f"name one: {known}")
    for record in chosen:
        if record.ray_address == "local":
            _end_process(record.pid, patience)
        else:
            _delete(record)
        forget(record.name)
    return [record.name for record in chosen]


def detach(words: Sequence[str], patience: float = 600) -> Record:
    """`rayft serve` with these words in a process of its own that outlives this one; returns when it answers.

    Raises:
        RunFailed, UsageError: what that process said.
    """
    before = {record.name: record.started for record in records()}
    log = _folder() / "last-start.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "rayft", "serve", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until = time.monotonic() + patience
    while time.monotonic() < until:
        for record in records():
            if record.pid == child.pid and record.started != before.get(record.name):
                os.replace(log, _folder() / f"{record.name}.log")
                return record
        if (code := child.poll()) is not None:
            raise _said(log.read_text(errors="replace"), code)
        time.sleep(0.2)
    child.terminate()
    raise RunFailed("R864", f"the server did not answer within {patience:.0f} s", f"its output: {log}")


def _said(output: str, code: int) -> RunFailed | UsageError:
    """The error that a process ended with, as an error of this one."""
    lines = [line for line in output.splitlines() if line.strip()]
    first = next((line for line in lines if line[:1] == "R" and line[1:4].isdigit()), None)
    if first is None:
        return RunFailed("R864", f"the server ended with exit code {code}: {lines[-1] if lines else 'no output'}")
    id, _, message = first.partition(": ")
    hint = next((line.partition("hint: ")[2] for line in lines if "hint: " in line), None)
    return UsageError(id, message, hint) if code == 2 else RunFailed(id, message, hint)


def _delete(record: Record) -> None:
    from rayft.runtime import session

    os.environ.setdefault("RAY_ADDRESS", record.ray_address)
    session.connect()
    Server(record.name, record.url, record.models, record.folder, record.ray_address).stop()


def _end_process(pid: int, patience: float) -> None:
    until = time.monotonic() + patience
    try:
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _folder() -> Path:
    return home() / "servers"


def _file(name: str) -> Path:
    return _folder() / f"{name}.json"
