"""The competitors of `train.py`: whole training runs, alive at the same time, of which one does a step at a time.

So every arm meets the same state of the machine, and their steps are compared one by one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import ray

from rayft.train import fit, launch

GATE = "benchmark-gate"


class Arm(Protocol):
    """One run. `start` blocks until its first step has ended and returns the seconds that took; `step` does one more
    and returns its seconds; `finish` lets the run end."""

    name: str

    def start(self) -> float: ...

    def step(self) -> float: ...

    def finish(self) -> None: ...


class PeerArm:
    """`hf_trainer.py` in a process of its own."""

    def __init__(self, name: str, options: dict[str, Any], *, threads: int, chunked: bool = False) -> None:
        self.name = name
        script = str(Path(__file__).with_name("hf_trainer.py"))
        pairs = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.command = [sys.executable, script, *pairs, "--threads", str(threads), *["--chunked"] * chunked]
        self.last: dict[str, Any] = {}

    def start(self) -> float:
        begin = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._wait()
        return time.perf_counter() - begin

    def step(self) -> float:
        begin = time.perf_counter()
        self._go()
        self._wait()
        return time.perf_counter() - begin

    def finish(self) -> None:
        self._go()
        self.process.wait()

    def _go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def _wait(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        self.last = json.loads(line)


class RayftArm:
    """`rayft.train.fit` as users call it, in a thread of this process, on this process's Ray session."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.name, self.recipe = recipe["name"], recipe
        self.waited = 0.0
        """Seconds that the run stood at the gate between its steps."""

    def start(self) -> float:
        begin = time.perf_counter()
        self.thread = threading.Thread(target=self._fit, daemon=True)
        self.thread.start()
        self._ask("arrived")
        return time.perf_counter() - begin

    def step(self) -> float:
        waited, seconds = self._ask("step")
        self.waited += waited
        return seconds

    def finish(self) -> None:
        ray.get(_gate().release.remote(self.name))
        self.thread.join()

    def _fit(self) -> None:
        self.result = fit(self.recipe, answer=None, quiet=True)

    def _ask(self, method: str) -> Any:
        """The gate's answer; a run that fails instead raises here."""
        reply = getattr(_gate(), method).remote(self.name)
        while not ray.wait([reply], timeout=1)[0]:
            if not self.thread.is_alive():
                raise RuntimeError(f"{self.name} ended before its time")
        return ray.get(reply)


class Gate:
    """An actor that lets each run do one step when it is told to."""

    def __init__(self) -> None:
        self.at_gate: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.leave: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.since: dict[str, float] = {}

    async def wait(self, name: str) -> None:
        """Called by a run at the end of each step."""
        self.since[name] = time.perf_counter()
        self.at_gate[name].set()
        await self.leave[name].wait()
        self.leave[name].clear()

    async def arrived(self, name: str) -> None:
        await self.at_gate[name].wait()

    async def release(self, name: str) -> None:
        self.at_gate[name].clear()
        self.leave[name].set()

    async def step(self, name: str) -> tuple[float, float]:
        """(seconds that the run has stood here, seconds of the step it does now)."""
        begin = time.perf_counter()
        waited = begin - self.since[name]
        await self.release(name)
        await self.at_gate[name].wait()
        return waited, self.since[name] - begin


class GatedRecorder(launch.RunRecorder):
    """The run's recorder; rank 0 asks it at the end of each step whether to stop, and the others wait for rank 0."""

    def __init__(self, path: str, recipe: dict[str, Any]) -> None:
        super().__init__(path, recipe)
        self._name = recipe["name"]

    def should_stop(self) -> bool:
        ray.get(_gate().wait.remote(self._name))
        return super().should_stop()


def open_gate() -> Any:
    """Put all runs of this process behind the gate, as long as what is returned is kept."""
    launch.RunRecorder = GatedRecorder  # type: ignore[misc]
    return ray.remote(Gate).options(name=GATE, num_cpus=0).remote()


def _gate() -> Any:
    return ray.get_actor(GATE)
