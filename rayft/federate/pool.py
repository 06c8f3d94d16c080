"""Workers that take calls: Ray actors, or one in this process. Both have the same few methods."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from rayft.errors import RunFailed
from rayft.federate.worker import Job, Worker

STILLBORN = 5
"""Workers that may die before they have loaded the base."""
DYING = "look at their logs in Ray's folder; less memory: a smaller federate.pack_size or model, fewer scale.workers"
_READY = object()
"""Key of a worker's start."""


@dataclass(frozen=True)
class Done:
    """A call that has ended. lost: its worker died under it, and ``value`` is None."""

    key: Hashable
    value: Any = None
    lost: str = ""


class Pool(Protocol):
    started: int
    """Workers started so far: each loads the base once."""

    @property
    def idle(self) -> int:
        """Workers without a call."""
        ...

    @property
    def starting(self) -> int:
        """Workers that are not ready yet; `wait` lets time pass until they are."""
        ...

    @property
    def busy(self) -> list[Hashable]:
        """Keys of the calls that have not ended."""
        ...

    def share(self, value: Any) -> Any:
        """Put a value where all workers find it, once; pass what comes back as an argument."""
        ...

    def submit(self, key: Hashable, method: str, *arguments: Any) -> None:
        """Give a call to an idle worker."""
        ...

    def wait(self, timeout: float, among: Collection[Hashable]) -> list[Done]:
        """The calls of these keys that have ended, as soon as there is one; [] after ``timeout`` seconds, or when
        another one has ended, whose worker is idle then. Errors of calls are raised as they were raised there."""
        ...

    def cancel(self, key: Hashable) -> None:
        """Kill the worker that has the call, and start another one in its place."""
        ...

    def close(self) -> None: ...


class Here:
    """One worker in this process. A call is done when it is submitted, so it cannot be cancelled."""

    def __init__(self, job: Job) -> None:
        self.worker = Worker(job)
        self.started = 1
        self.starting = 0
        self._done: list[Done] = []

    @property
    def idle(self) -> int:
        return 0 if self._done else 1

    @property
    def busy(self) -> list[Hashable]:
        return [done.key for done in self._done]

    def share(self, value: Any) -> Any:
        return value

    def submit(self, key: Hashable, method: str, *arguments: Any) -> None:
        self._done.append(Done(key, getattr(self.worker, method)(*arguments)))

    def wait(self, timeout: float, among: Collection[Hashable]) -> list[Done]:
        done = [one for one in self._done if one.key in among]
        self._done = [one for one in self._done if one.key not in among]
        return done

    def cancel(self, key: Hashable) -> None:
        self._done = [done for done in self._done if done.key != key]

    def close(self) -> None:
        pass


class Actors:
    """Ray actors, each with the resources of a placement. One that dies is replaced at once."""

    def __init__(
        self, job: Job, count: int, resources: dict[str, float], environment: dict[str, str] | None = None
    ) -> None:
        import ray

        needed = dict(resources)
        self._class = ray.remote(Worker).options(
            num_cpus=needed.pop("CPU", 1),
            num_gpus=needed.pop("GPU", 0),
            resources=needed,
            max_restarts=0,
            max_task_retries=0,
        )
        self._job, self._environment = ray.put(job), environment or {}
        self.started = 0
        self._idle: list[Any] = []
        self._calls: dict[Any, tuple[Hashable, Any]] = {}
        self._done: list[Done] = []
        self._stillborn = 0
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        """A new worker; it is idle once it has loaded its base."""
        self.started += 1
        actor = self._class.remote(self._job, self._environment)
        self._calls[actor.ready.remote()] = (_READY, actor)

    @property
    def starting(self) -> int:
        return sum(key is _READY for key, _ in self._calls.values())

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> list[Hashable]:
        return [key for key, _ in self._calls.values() if key is not _READY]

    def share(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def submit(self, key: Hashable, method: str, *arguments: Any) -> None:
        actor = self._idle.pop(0)
        self._calls[getattr(actor, method).remote(*arguments)] = (key, actor)

    def wait(self, timeout: float, among: Collection[Hashable]) -> list[Done]:
        import ray

        if not any(done.key in among for done in self._done):
            if not self._calls:
                time.sleep(min(timeout, 0.05))
                return []
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout)
            self._done += [done for reference in ready if (done := self._ended(reference)).key is not _READY]
        found = [done for done in self._done if done.key in among]
        self._done = [done for done in self._done if done.key not in among]
        return found

    def _ended(self, reference: Any) -> Done:
        import ray

        key, actor = self._calls.pop(reference)
        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as error:  # the actor, its node or its result is gone
            said = str(error).strip().splitlines()[0]
            self._stillborn += key is _READY
            if self._stillborn > STILLBORN:
                raise RunFailed("R922", f"workers die while they load the base: {said}", DYING) from None
            self._start()
            return Done(key, lost=said)
        self._idle.append(actor)
        return Done(key, value)

    def cancel(self, key: Hashable) -> None:
        import ray

        self._done = [done for done in self._done if done.key != key]
        for reference, (other, actor) in list(self._calls.items()):
            if other == key:
                del self._calls[reference]
                ray.kill(actor)
                self._start()

    def close(self) -> None:
        import ray

        for actor in [*self._idle, *(actor for _, actor in self._calls.values())]:
            ray.kill(actor)
        self._idle, self._calls = [], {}
