"""Waiting requests, shared out fairly among flows: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

Every flow has a time of its own, which goes on by the cost of each request that it sends; whose time is earliest goes
next. A flow that was away comes back at the time of who goes, so that it is neither paid nor punished for its absence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator

from rayft.inference.flight import Flight, Flow


class _Level:
    """The flows of one priority."""

    def __init__(self) -> None:
        self.waiting: dict[Flow, deque[Flight]] = {}
        """Each has at least one request."""
        self.time: dict[Flow, int] = {}
        """In tokens. Flows that were emptied stay until the others have caught up with them."""
        self.now = 0
        """The time of the flow that went last."""


class FairQueue:
    """A request's cost is the tokens that it may take (`Flight.cost`). In the long run every flow that always waits is
    given the same number of tokens, whatever the number and length of its requests."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self.tokens = 0
        """Of all prompts that wait."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Flight]:
        return (flight for level in self._levels.values() for waiting in level.waiting.values() for flight in waiting)

    def heads(self) -> list[Flight]:
        """The next request of each flow and priority."""
        return [waiting[0] for level in self._levels.values() for waiting in level.waiting.values()]

    def push(self, flight: Flight, *, first: bool = False) -> None:
        """At the end of its flow, or before the others of its flow."""
        level = self._levels.setdefault(flight.request.priority, _Level())
        waiting = level.waiting.setdefault(flight.flow, deque())
        if not waiting:
            level.time[flight.flow] = max(level.time.get(flight.flow, 0), level.now)
        (waiting.appendleft if first else waiting.append)(flight)
        self.tokens += len(flight.tokens)
        self._count += 1

    def next(self, passed_over: Container[Flow] = ()) -> Flight | None:
        """Whose turn it is, among the flows that are not passed over; it stays in the queue."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            flows = [flow for flow in level.waiting if flow not in passed_over]
            if flows:
                return level.waiting[min(flows, key=level.time.__getitem__)][0]
        return None

    def charge(self, flight: Flight) -> None:
        """Take a request out of the queue and let its flow pay for it, the first time that it runs."""
        level = self._levels[flight.request.priority]
        level.now = max(level.now, level.time[flight.flow])
        level.time[flight.flow] += 0 if flight.number else flight.cost
        self.remove(flight)

    def remove(self, flight: Flight) -> None:
        level = self._levels[flight.request.priority]
        waiting = level.waiting[flight.flow]
        waiting.remove(flight)
        self.tokens -= len(flight.tokens)
        self._count -= 1
        if not waiting:
            del level.waiting[flight.flow]
            level.time = {flow: at for flow, at in level.time.items() if flow in level.waiting or at > level.now}
