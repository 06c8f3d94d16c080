"""Workers that take calls: Ray actors, or one in this process. Both have the same few methods."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rayft.errors import RunFailed
from rayft.federate.worker import Job, Worker

STILLBORN = 5
"""Workers that may die before they have loaded the base."""
DYING = "look at their logs in Ray's folder; less memory: a smaller federate.pack_size or model, fewer scale.workers"
PATIENCE = 10.0
"""Seconds that a worker of a site may take to start before its node is looked for."""
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

    def free(self, site: int | None) -> bool:
        """Whether a worker of that site (None: any worker) is without a call."""
        ...

    def gone(self, site: int | None) -> str:
        """Why that site (None: each of them) can have no worker for now, as the end of a sentence; empty while it has
        one, or may."""
        ...

    def share(self, value: Any) -> Any:
        """Put a value where all workers find it, once; pass what comes back as an argument."""
        ...

    def submit(self, key: Hashable, method: str, *arguments: Any, site: int | None = None) -> None:
        """Give a call to an idle worker of that site."""
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

    def free(self, site: int | None) -> bool:
        return not self._done

    def gone(self, site: int | None) -> str:
        return ""

    def share(self, value: Any) -> Any:
        return value

    def submit(self, key: Hashable, method: str, *arguments: Any, site: int | None = None) -> None:
        self._done.append(Done(key, getattr(self.worker, method)(*arguments)))

    def wait(self, timeout: float, among: Collection[Hashable]) -> list[Done]:
        done = [one for one in self._done if one.key in among]
        self._done = [one for one in self._done if one.key not in among]
        return done

    def cancel(self, key: Hashable) -> None:
        self._done = [done for done in self._done if done.key != key]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Place:
    """A site's worker: what it is made of, what it takes there, and the labels of its node."""

    job: Job
    resources: Mapping[str, float]
    label_selector: Mapping[str, str]
    name: str = ""


@dataclass(frozen=True)
class _Actor:
    handle: Any
    site: int | None
    began: float


class Actors:
    """Ray actors, each with the resources of a placement. One that dies is replaced at once, at the same place."""

    def __init__(
        self,
        job: Job,
        count: int,
        resources: Mapping[str, float],
        environment: dict[str, str] | None = None,
        sites: Sequence[Place] = (),
    ) -> None:
        """``count`` workers of one kind, or one for each site."""
        import ray

        self._places: dict[int | None, Place] = {} if sites else {None: Place(job, resources, {})}
        self._places.update(enumerate(sites))
        self._classes = {site: _class(place) for site, place in self._places.items()}
        self._jobs = {site: ray.put(place.job) for site, place in self._places.items()}
        self._environment = environment or {}
        self.started = 0
        self._idle: list[_Actor] = []
        self._calls: dict[Any, tuple[Hashable, _Actor]] = {}
        self._done: list[Done] = []
        self._stillborn = 0
        self._looked: dict[int, tuple[float, str]] = {}
        for site in list(self._places) * (1 if sites else count):
            self._start(site)

    def _start(self, site: int | None) -> None:
        """A new worker; it is idle once it has loaded its base."""
        self.started += 1
        handle = self._classes[site].remote(self._jobs[site], self._environment)
        self._calls[handle.ready.remote()] = (_READY, _Actor(handle, site, time.monotonic()))

    @property
    def starting(self) -> int:
        return sum(key is _READY and not self.gone(actor.site) for key, actor in self._calls.values())

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> list[Hashable]:
        return [key for key, _ in self._calls.values() if key is not _READY]

    def free(self, site: int | None) -> bool:
        return any(site in (None, actor.site) for actor in self._idle)

    def gone(self, site: int | None) -> str:
        if site is None:
            reasons = [self.gone(place) for place in self._places if place is not None]
            return reasons[0] if reasons and all(reasons) else ""
        began = [actor.began for key, actor in self._calls.values() if key is _READY and actor.site == site]
        if not began or time.monotonic() - began[0] < PATIENCE:
            return ""
        looked, found = self._looked.get(site, (-PATIENCE, ""))
        if time.monotonic() - looked > 1:
            found = _missing(self._places[site])
            self._looked[site] = time.monotonic(), found
        return found

    def share(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def submit(self, key: Hashable, method: str, *arguments: Any, site: int | None = None) -> None:
        actor = next(actor for actor in self._idle if site in (None, actor.site))
        self._idle.remove(actor)
        self._calls[getattr(actor.handle, method).remote(*arguments)] = (key, actor)

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
            self._start(actor.site)
            return Done(key, lost=said)
        self._idle.append(actor)
        return Done(key, value)

    def cancel(self, key: Hashable) -> None:
        import ray

        self._done = [done for done in self._done if done.key != key]
        for reference, (other, actor) in list(self._calls.items()):
            if other == key:
                del self._calls[reference]
                ray.kill(actor.handle)
                self._start(actor.site)

    def close(self) -> None:
        import ray

        for actor in [*self._idle, *(actor for _, actor in self._calls.values())]:
            ray.kill(actor.handle)
        self._idle, self._calls = [], {}


def _class(place: Place) -> Any:
    import ray

    needed = dict(place.resources)
    return ray.remote(Worker).options(
        num_cpus=needed.pop("CPU", 1),
        num_gpus=needed.pop("GPU", 0),
        resources=needed,
        label_selector=dict(place.label_selector),
        max_restarts=0,
        max_task_retries=0,
    )


def _missing(place: Place) -> str:
    """Why no living node can hold the worker; empty when one can, now or when others have ended."""
    from rayft.runtime.cluster import snapshot

    nodes = snapshot().nodes
    if any(node.has(place.label_selector) and node.room(place.resources) for node in nodes):
        return ""
    return f"the node of its data is gone: no living one is {place.name}"
