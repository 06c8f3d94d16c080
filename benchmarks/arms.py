"""The competitors of the benchmarks: whole training runs, alive at the same time, of which one does a step at a time.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
from claim import note

from rayft.train import fit, launch

GATE = "benchmark-gate"


class Arm(Protocol):
    """One run. `start` blocks until its first step has ended and returns the seconds that took; `step` does one more
    and returns its seconds; `finish` lets the run end."""

    name: str

    def start(self) -> float: ...

    def step(self) -> float: ...

    def finish(self) -> None: ...


class ProcessArm:
    """A script in a process of its own, which does one step for each line on its standard input and answers with a
    line, a JSON object that is kept in `answers`; it does the first step unasked."""

    def __init__(self, name: str, script: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.command = [sys.executable, str(Path(__file__).parent / script), *arguments]
        self.answers: list[dict[str, Any]] = []

    def start(self) -> float:
        begin = time.perf_counter()
        self.launch()
        self.wait()
        return time.perf_counter() - begin

    def step(self) -> float:
        begin = time.perf_counter()
        self.go()
        self.wait()
        return time.perf_counter() - begin

    def finish(self) -> None:
        """Let it do what is left of its steps, one at most, and end."""
        self.go()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def launch(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        self.answers.append(json.loads(line))


class PeerArm(ProcessArm):
    """`hf_trainer.py` in a process of its own."""

    def __init__(self, name: str, options: dict[str, Any], *, threads: int, chunked: bool = False) -> None:
        pairs = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        super().__init__(name, "hf_trainer.py", [*pairs, "--threads", str(threads), *["--chunked"] * chunked])


class TogetherArm:
    """Several processes that do a step at the same time."""

    def __init__(self, name: str, arms: Sequence[ProcessArm]) -> None:
        self.name, self.arms = name, arms

    def start(self) -> float:
        begin = time.perf_counter()
        for arm in self.arms:
            arm.launch()
        for arm in self.arms:
            arm.wait()
        return time.perf_counter() - begin

    def step(self) -> float:
        begin = time.perf_counter()
        for arm in self.arms:
            arm.go()
        for arm in self.arms:
            arm.wait()
        return time.perf_counter() - begin

    def finish(self) -> None:
        for arm in self.arms:
            arm.finish()


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
        self._answer(gate().arrived.remote(self.name))
        return time.perf_counter() - begin

    def step(self) -> float:
        waited, seconds = self._answer(gate().step.remote(self.name))
        self.waited += waited
        return seconds

    def finish(self) -> None:
        ray.get(gate().release.remote(self.name))
        self.thread.join()

    def _fit(self) -> None:
        self.result = fit(self.recipe, answer=None, quiet=True)

    def _answer(self, reply: Any) -> Any:
        return answer_of(reply, self.thread, self.name)


def answer_of(reply: Any, thread: threading.Thread, name: str) -> Any:
    """The gate's answer; a run that ended in its thread instead raises here."""
    while not ray.wait([reply], timeout=1)[0]:
        if not thread.is_alive():
            raise RuntimeError(f"{name} ended before its time")
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
        ray.get(gate().wait.remote(self._name))
        return super().should_stop()


@contextmanager
def open_gate() -> Iterator[None]:
    """All runs of this process are behind the gate inside."""
    stock = launch.RunRecorder
    launch.RunRecorder = GatedRecorder  # type: ignore[misc]
    opened = ray.remote(Gate).options(name=GATE, num_cpus=0).remote()
    try:
        yield
    finally:
        launch.RunRecorder = stock  # type: ignore[misc]
        ray.kill(opened)


def gate() -> Any:
    return ray.get_actor(GATE)


def race(arms: Sequence[Arm], steps: int) -> dict[str, list[float]]:
    """Start all arms, then take `steps` timed steps of each in turns: seconds by name. Each turn begins with another
    arm."""
    for arm in arms:
        note(f"start-up and first step of {arm.name}: {arm.start():.1f} s")
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(steps):
        for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
            seconds[arm.name].append(arm.step())
    for arm in arms:
        arm.finish()
    return seconds
