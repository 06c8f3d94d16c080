"""Clients that fit a straight line, for tests of the rounds without a model: real training of two numbers.

A client's data are points (x, y); its loss is the mean of (w x + b - y)^2 / 2; it makes full-batch gradient steps.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rayft.federate.messages import Alphas, Answer
from rayft.federate.task import Block, Measured, Opening, Task


def points(client: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Every client sees another part of the line, with noise of its own."""
    draw = np.random.default_rng([5, client])
    x = draw.normal(client % 5 - 2, 1.0, count or 3 + client % 4)
    return x, 1.5 * x - 0.5 + 0.1 * draw.normal(size=len(x))


def gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    residual = w[0] * x + w[1] - y
    return np.array([(residual * x).mean(), residual.mean()])


@dataclass(frozen=True)
class ToyJob:
    steps: int = 3
    folder: str = ""
    """Where faults are told, and tell that they have happened."""
    faults: tuple[tuple[int, str], ...] = ()
    """(client, what it does): nan, raise, hang, shape, nothing, die_once, die."""
    seconds: float = 0.0
    """That a block takes."""

    def make(self) -> Toy:
        return Toy(self)


class Toy:
    def __init__(self, job: ToyJob) -> None:
        self.job = job
        if job.folder:
            with open(Path(job.folder, "loads"), "ab") as file:
                file.write(b".")

    def open(self) -> Opening:
        return Opening({"w": torch.zeros(2, dtype=torch.float64)}, Alphas(1.0))

    def train(self, task: Task, block: Block) -> list[Answer]:
        time.sleep(self.job.seconds)
        return [self._one(task, client) for client in block.clients]

    def _one(self, task: Task, client: int) -> Answer:
        fault = dict(self.job.faults).get(client, "")
        if fault == "raise":
            return Answer(client, error="ValueError: it did not want to")
        if fault == "nothing":
            return Answer(client)
        if fault == "hang":
            time.sleep(3600)
        if fault in ("die", "die_once"):
            self._die(client, always=fault == "die")
        x, y = points(client)
        begun = task.server.state["w"].numpy()
        w = begun.copy()
        for _ in range(self.job.steps):
            w = w - task.learning_rate * gradient(w, x, y)
        state = torch.from_numpy(w)
        if fault == "nan":
            state = state * float("nan")
        if fault == "shape":
            state = torch.zeros(3, dtype=torch.float64)
        loss = float(((begun[0] * x + begun[1] - y) ** 2).mean() / 2)
        return Answer(client, {"w": state}, len(x), facts={"loss": loss, "tokens": float(len(x))})

    def _die(self, client: int, *, always: bool) -> None:
        told = Path(self.job.folder, f"died-{client}")
        if always or not told.exists():
            told.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def evaluate(self, task: Task, block: Block) -> list[Measured]:
        w = task.server.state["w"].numpy()
        found = []
        for client in block.clients:
            x, y = points(client)
            found.append(Measured(client, float(((w[0] * x + w[1] - y) ** 2).mean() / 2), len(x)))
        return found

    def central(self, task: Task) -> float | None:
        x, y = points(999, 50)
        w = task.server.state["w"].numpy()
        return float(((w[0] * x + w[1] - y) ** 2).mean() / 2)
