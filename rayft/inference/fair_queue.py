"""Waiting requests, shared out fairly among flows: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995)."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Iterator

from rayft.inference.flight import Flight, Flow

QUANTUM = 512
"""Tokens that a flow earns per round."""


class _Level:
    """The flows of one priority."""

    def __init__(self) -> None:
        self.flows: OrderedDict[Flow, deque[Flight]] = OrderedDict()
        """In the order of the round; each has at least one request."""
        self.credit: dict[Flow, int] = {}


class FairQueue:
    """A request's cost is the tokens that it may take (`Flight.cost`). In the long run every flow that always waits is
    given the same number of tokens, whatever the number and length of its requests."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self.tokens = 0
        """Of all prompts that wait."""

    def __len__(self) -> int:
        return sum(len(waiting) for level in self._levels.values() for waiting in level.flows.values())

    def __iter__(self) -> Iterator[Flight]:
        return (flight for level in self._levels.values() for waiting in level.flows.values() for flight in waiting)

    def heads(self) -> list[Flight]:
        """The next request of each flow and priority."""
        return [waiting[0] for level in self._levels.values() for waiting in level.flows.values()]

    def push(self, flight: Flight, *, first: bool = False) -> None:
        """At the end of its flow, or before the others of its flow."""
        level = self._levels.setdefault(flight.request.priority, _Level())
        waiting = level.flows.setdefault(flight.flow, deque())
        level.credit.setdefault(flight.flow, 0)
        (waiting.appendleft if first else waiting.append)(flight)
        self.tokens += len(flight.tokens)

    def next(self, passed_over: Container[Flow] = ()) -> Flight | None:
        """Whose turn it is, among the flows that are not passed over; it stays in the queue."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            if all(flow in passed_over for flow in level.flows):
                continue
            while True:
                flow, waiting = next(iter(level.flows.items()))
                if flow not in passed_over:
                    if level.credit[flow] >= waiting[0].cost:
                        return waiting[0]
                    level.credit[flow] += QUANTUM
                level.flows.move_to_end(flow)
        return None

    def charge(self, flight: Flight) -> None:
        """Take a request out of the queue and let its flow pay for it."""
        self._levels[flight.request.priority].credit[flight.flow] -= flight.cost
        self.remove(flight)

    def remove(self, flight: Flight) -> None:
        level = self._levels[flight.request.priority]
        waiting = level.flows[flight.flow]
        waiting.remove(flight)
        self.tokens -= len(flight.tokens)
        if not waiting:  # who has nothing to send saves nothing up
            del level.flows[flight.flow], level.credit[flight.flow]
        if not level.flows:
            del self._levels[flight.request.priority]
