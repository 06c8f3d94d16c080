"""What a worker's process does with a block: train its clients and sum their answers up, where they are."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from typing import Any, Protocol

from rayft.federate.aggregate import partial, reason_to_refuse
from rayft.federate.state import difference
from rayft.federate.task import Block, Local, Measured, Opening, Task, Trained


class Job(Protocol):
    """Plain data that a worker makes its `Local` from."""

    def make(self) -> Local: ...


class Worker:
    """An actor, or an object of the driver's process. Loads its base once, when it is opened."""

    def __init__(self, job: Job, environment: dict[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self._job = job
        self._local: Local | None = None

    @property
    def local(self) -> Local:
        if self._local is None:
            self._local = self._job.make()
        return self._local

    def ready(self) -> None:
        """Load the base."""
        _ = self.local

    def open(self) -> Opening:
        return self.local.open()

    def train(self, task: Task, block: Block) -> Trained:
        began = time.monotonic()
        answers = self.local.train(task, block)
        total = partial(task.setting, task.server, answers)
        changes: tuple[Any, ...] = ()
        if task.setting.federate.strategy == "fedbuff":
            usable = [answer for answer in answers if not reason_to_refuse(task.setting, task.server, answer)]
            changes = tuple((answer.client, difference(answer.state, task.server.state)) for answer in usable)
            total = replace(total, sums={}, products={})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Trained(block, total, time.monotonic() - began, peak, changes)

    def evaluate(self, task: Task, block: Block) -> list[Measured]:
        return self.local.evaluate(task, block)

    def central(self, task: Task) -> float | None:
        return self.local.central(task)
