"""FedBuff (arXiv 2106.06639): clients work without rounds, and every K answers make a new version of the server.

What is at work at a version's end goes on; a resumed run begins it anew. The order of arrival decides the numbers, so
two runs are equal only where it is (one worker).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayft.config.federate import Federate
from rayft.errors import RunFailed
from rayft.federate.aggregate import join
from rayft.federate.messages import Partial
from rayft.federate.pool import Pool
from rayft.federate.privacy import expected
from rayft.federate.round import POLL_SECONDS, Gathered, Interrupted
from rayft.federate.state import State
from rayft.federate.task import Block, Task, Trained


@dataclass(frozen=True)
class Arrival:
    """A client's change, and the round it began in."""

    client: int
    change: State
    number: int


class Flight:
    """Keeps `concurrency` clients at work and collects what they bring."""

    def __init__(self, pool: Pool, federate: Federate, population: int, seed: int) -> None:
        self.pool, self.federate, self.population, self.seed = pool, federate, population, seed
        self.concurrency = min(federate.concurrency or round(expected(federate, population)), population)
        self._at_work: dict[int, tuple[Block, int]] = {}
        self._buffer: list[Arrival] = []
        self._drawn = 0
        self._shared: tuple[int, Any] = (0, None)

    def collect(self, task: Task, kept: dict[int, int], stopping: Callable[[], bool]) -> tuple[list[Arrival], Gathered]:
        """The next `buffer` answers, in the order of clients, and what the log needs of them.

        Raises Interrupted; RunFailed R920 when too many clients fail.
        """
        began, found, federate = time.monotonic(), Gathered(), self.federate
        while len(self._buffer) < federate.buffer:
            if stopping():
                for key in self.pool.busy:
                    self.pool.cancel(key)
                raise Interrupted
            self._fill(task, kept)
            for done in self.pool.wait(POLL_SECONDS, self._at_work):
                block, number = self._at_work.pop(int(done.key))  # type: ignore[call-overload]  # numbers of blocks
                if done.lost:
                    found.lost.append(f"the worker of clients {', '.join(map(str, block.clients))} died: {done.lost}")
                    lost = tuple((client, "its worker died") for client in block.clients)
                    found.total = join(found.total, Partial(failed=lost))
                else:
                    self._take(done.value, number, task, found)
                self._check(found, task.setting.number)
        taken, self._buffer = self._buffer[: federate.buffer], self._buffer[federate.buffer :]
        found.seconds = time.monotonic() - began
        return sorted(taken, key=lambda arrival: arrival.client), found

    def _fill(self, task: Task, kept: dict[int, int]) -> None:
        """Idle workers get the next clients, at the version of now."""
        number = task.setting.number
        if self._shared[0] != number:
            self._shared = number, self.pool.share(task)
        while self.pool.idle:
            busy = {client for block, _ in self._at_work.values() for client in block.clients}
            missing = self.federate.buffer - len(self._buffer) - len(busy)
            room = min(self.federate.pack_size, self.concurrency - len(busy))
            if missing > 0:  # the next version is near: nobody needs to begin with this one beyond it
                room = min(room, missing)
            clients = self._next(room, busy)
            if not clients:
                return
            block = Block(self._drawn, tuple(clients), {c: kept[c] for c in clients if c in kept})
            self._at_work[block.number] = (block, number)
            self.pool.submit(block.number, "train", self._shared[1], block)

    def _next(self, room: int, busy: set[int]) -> list[int]:
        """Clients in random order, each once per pass; one that is at work is left out of its turn."""
        found: list[int] = []
        for _ in range(2 * self.population):
            if len(found) >= room:
                break
            turn, place = divmod(self._drawn, self.population)
            client = int(np.random.default_rng([self.seed, 10, turn]).permutation(self.population)[place])
            self._drawn += 1
            if client not in busy and client not in found:
                found.append(client)
        return sorted(found)

    def _take(self, trained: Trained, number: int, task: Task, found: Gathered) -> None:
        """An answer of a block; one that is too old is dropped."""
        found.peak_memory = max(found.peak_memory, trained.peak_memory)
        staleness = task.setting.number - number
        limit = self.federate.max_staleness
        if limit is not None and staleness > limit:
            found.late += trained.block.clients
            return
        found.total = join(found.total, replace(trained.partial, sums={}, products={}))
        self._buffer += [Arrival(client, change, number) for client, change in trained.changes]

    def _check(self, found: Gathered, number: int) -> None:
        failed, answered = found.total.failed, len(found.total.clients)
        if len(failed) > max(self.federate.buffer, answered) * self.federate.cohort.max_failed:
            client, reason = failed[0]
            raise RunFailed(
                "R920",
                f"{len(failed)} clients failed on the way to version {number}: client {client}: {reason}",
                "mend them and go on with --resume, or allow more with federate.cohort.max_failed",
            )
