"""One synchronous round: blocks go out to the workers, and their sums come together in a fixed tree."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rayft.errors import RunFailed
from rayft.federate.aggregate import join
from rayft.federate.messages import Partial
from rayft.federate.pool import Pool
from rayft.federate.sample import units
from rayft.federate.task import Block, Task, Trained
from rayft.federate.tree import Tree

POLL_SECONDS = 0.2


class Interrupted(Exception):
    """The run was asked to stop; the round is given up."""


@dataclass
class Gathered:
    """What a round has brought together."""

    total: Partial = field(default_factory=Partial)
    late: list[int] = field(default_factory=list)
    """Clients that were not waited for."""
    lost: list[str] = field(default_factory=list)
    """Deaths of workers, as sentences."""
    seconds: float = 0.0
    peak_memory: int = 0
    """Bytes, of the largest worker."""


def gather(
    pool: Pool,
    task: Task,
    cohort: list[int],
    kept: dict[int, int],
    *,
    enough: int,
    retries: int,
    sites: Sequence[int] = (),
    deadline: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Gathered:
    """Train a cohort and add its answers up.

    kept: client -> round of its current state. enough: clients after whose answers the others are not waited for.
    retries: how often a block may lose its worker; then its clients have failed. sites: client -> where its data is
    pinned; the clients of a place that is gone have failed. deadline: seconds for all of it, from when all workers have
    their base.

    Raises Interrupted.
    """
    while deadline is not None and pool.starting and not stopping():
        pool.wait(POLL_SECONDS, ())
    began = time.monotonic()
    federate = task.setting.federate
    all_units = units(cohort, federate.pack_size, kept, sites)
    found = Gathered()
    if not all_units:
        return found
    tree = Tree[Partial](len(all_units), join)
    shared = pool.share(task)
    waiting, open_units, deaths = deque(all_units), {unit.number: unit for unit in all_units}, dict.fromkeys(cohort, 0)
    answered = 0

    def leave_out(unit: Block, partial: Partial) -> None:
        tree.add(unit.number, partial)
        del open_units[unit.number]

    while open_units:
        if stopping():
            for key in pool.busy:
                pool.cancel(key)
            raise Interrupted
        over = deadline is not None and time.monotonic() - began > deadline
        if over or answered >= enough:
            for unit in list(open_units.values()):
                if unit.number in pool.busy:
                    pool.cancel(unit.number)
                found.late += unit.clients
                leave_out(unit, Partial())
            break
        for unit in list(waiting):
            if not pool.idle and not sites:
                break
            if pool.free(unit.site):
                pool.submit(unit.number, "train", shared, unit, site=unit.site)
            elif reason := pool.gone(unit.site):
                leave_out(unit, Partial(failed=tuple((client, reason) for client in unit.clients)))
            else:
                continue
            waiting.remove(unit)
        for done in pool.wait(POLL_SECONDS, open_units):
            unit = open_units[int(done.key)]  # type: ignore[call-overload]  # keys are the units' numbers
            if done.lost:
                found.lost.append(f"the worker of clients {_listed(unit.clients)} died: {done.lost}")
                deaths[unit.clients[0]] += 1
                if deaths[unit.clients[0]] > retries >= 0:
                    failed = tuple((client, "its worker died again and again") for client in unit.clients)
                    leave_out(unit, Partial(failed=failed))
                else:
                    waiting.appendleft(unit)
                continue
            trained: Trained = done.value
            answered += len(trained.partial.clients)
            found.peak_memory = max(found.peak_memory, trained.peak_memory)
            leave_out(unit, trained.partial)
    found.total = tree.result()
    found.seconds = time.monotonic() - began
    return found


def check(found: Gathered, cohort: list[int], minimum: int, max_failed: float, number: int) -> None:
    """Whether a round counts. Raises RunFailed R920 when too many clients failed, R921 when too few answered."""
    failed, total = found.total.failed, len(cohort)
    reasons = "; ".join(f"client {client}: {reason}" for client, reason in failed[:3])
    if failed and (len(failed) == total or len(failed) > max_failed * total):
        raise RunFailed(
            "R920",
            f"{len(failed)} of {total} clients failed in round {number}: {reasons}",
            "mend them and go on with --resume, or allow more with federate.cohort.max_failed",
        )
    answered = len(found.total.clients)
    if total and answered < minimum:
        late = f", {len(found.late)} were late" if found.late else ""
        raise RunFailed(
            "R921",
            f"{answered} of {total} clients answered in round {number}{late}, and federate.cohort.minimum is {minimum}"
            + (f" ({reasons})" if reasons else ""),
            "a longer federate.cohort.deadline_s, a larger cohort or a smaller minimum; then --resume",
        )


def without_sums(total: Partial) -> Partial:
    """What the log needs of a round."""
    return replace(total, sums={}, products={}, controls={}, members=())


def _listed(clients: tuple[int, ...]) -> str:
    return ", ".join(map(str, clients[:4])) + (" ..." if len(clients) > 4 else "")
