"""Which tokens of which requests the next step computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from rayft.inference.adapters import AdapterTable
from rayft.inference.fair_queue import FairQueue
from rayft.inference.flight import Flight, Flow
from rayft.inference.kv_cache import KVCache
from rayft.inference.prefix import PrefixCache
from rayft.inference.settings import EngineSettings
from rayft.multilora.route import BASE

Short = Literal["rows", "cache", "slots"]
"""What a request needs that others hold."""


@dataclass(frozen=True)
class Share:
    """The next ``tokens`` tokens of a request are computed; if none is missing then, one more is chosen."""

    flight: Flight
    tokens: int

    @property
    def samples(self) -> bool:
        return self.tokens == self.flight.missing


class Scheduler:
    """Iteration level: requests join and leave between any two steps.

    Decoding requests come first, one token each; the rest of the step's tokens goes to pieces of prompts, those first
    that have waited longest. When the cache is full, the latest of the least urgent requests gives its place back and
    is computed again later: its answer does not change.
    """

    def __init__(
        self, settings: EngineSettings, cache: KVCache, prefix: PrefixCache | None, adapters: AdapterTable
    ) -> None:
        self.settings, self.cache, self.prefix, self.adapters = settings, cache, prefix, adapters
        self.queue = FairQueue()
        self.running: list[Flight] = []
        self.preemptions = 0
        self._in_use_since: dict[str, float] = {}
        """By adapter: since when some request has been running with it."""
        self._full = False
        """The cache overflowed, and nothing has left since: who entered now would be thrown out again."""
        self._step = self._entered = 0

    def add(self, flight: Flight) -> None:
        self.queue.push(flight)

    def leave(self, flight: Flight) -> None:
        """Finished or cancelled: everything it holds is free at once."""
        if flight.slab is None:
            self.queue.remove(flight)
            return
        self._free(flight)
        self._full = False

    def schedule(self, now: float) -> list[Share]:
        """The shares of one step, decoding requests first."""
        self._step += 1
        self._full = self._full and bool(self.running)
        self._admit_overdue(now)
        self._admit(now)
        shares = self._decode(now)
        left = self.settings.max_num_batched_tokens - len(shares)
        for flight in sorted((f for f in self.running if f.missing > 1), key=lambda f: (f.turn, f.number)):
            if left == 0:
                break
            flight.turn = self._step
            shares.append(Share(flight, min(flight.missing, left)))
            left -= shares[-1].tokens
        return shares

    def _decode(self, now: float) -> list[Share]:
        """One token for every request that has all others; whoever does not fit any more gives way."""
        shares = []
        for flight in sorted(self.running, key=_urgency):
            if flight.slab is None or flight.missing > 1:
                continue
            while flight.slab is not None and not self.cache.grow(flight.slab, len(flight.tokens)):
                self._full = True
                self._preempt(max(self.running, key=_urgency), now)
            if flight.slab is not None:
                shares.append(Share(flight, 1))
        return shares

    def _admit(self, now: float) -> None:
        passed_over: set[Flow] = set()
        flows = Counter(flight.flow for flight in self.running)
        prompts = sum(flight.missing for flight in self.running if flight.missing > 1)
        while (flight := self.queue.next(passed_over)) is not None:
            # Prompts for a step are enough: who is let in later may come from a flow with less.
            if prompts >= self.settings.max_num_batched_tokens and flows[flight.flow]:
                passed_over.add(flight.flow)
                continue
            short = self._enter(flight, now)
            if short == "slots":
                passed_over.add(flight.flow)
            elif short is not None:
                return
            else:
                flows[flight.flow] += 1
                prompts += flight.missing

    def _admit_overdue(self, now: float) -> None:
        """Let in who has waited too long, if its flow runs less than its share, in the place of who has more."""
        overdue = [flight for flight in self.queue.heads() if now - flight.waiting_since >= self.settings.longest_wait]
        if not overdue:
            return
        flows = Counter(flight.flow for flight in self.running)
        share = max(1, self.settings.max_num_seqs // len(flows.keys() | {head.flow for head in self.queue.heads()}))
        for flight in sorted(overdue, key=lambda f: f.waiting_since):
            if flows[flight.flow] >= share:
                continue
            while (short := self._enter(flight, now)) is not None:
                victims = self._victims(flight, short, share, now)
                for victim in victims:
                    self._preempt(victim, now)
                if not victims:
                    break
                self._full = False
            flows = Counter(flight.flow for flight in self.running)

    def _victims(self, flight: Flight, short: Short, share: int, now: float) -> list[Flight]:
        """Who gives way to an overdue request: nobody more urgent, and nobody who has just begun.

        Since the request would have had the next free place, all that others hold they have held for as long as it has
        waited, unless their turn came in between.
        """
        long_ago = now - self.settings.longest_wait
        if short == "slots":
            users: dict[str, list[Flight]] = {}
            for other in self.running:
                if other.adapter is not None:
                    users.setdefault(other.adapter, []).append(other)
            possible = [
                flights
                for adapter, flights in users.items()
                if self._in_use_since[adapter] <= long_ago
                and not self.adapters.is_pinned(adapter)
                and min(other.request.priority for other in flights) >= flight.request.priority
            ]
            return min(possible, key=len, default=[])
        flows = Counter(other.flow for other in self.running)
        others = [
            other
            for other in self.running
            if other.request.priority >= flight.request.priority
            and other.admitted <= long_ago
            and flows[other.flow] > share
        ]
        return [max(others, key=lambda f: (flows[f.flow], *_urgency(f)))] if others else []

    def _enter(self, flight: Flight, now: float) -> Short | None:
        """Let a waiting request run; what is short, where it cannot."""
        if flight.adapter is not None and not self.adapters.available(flight.adapter):
            return "slots"
        if len(self.running) >= self.settings.max_num_seqs:
            return "rows"
        if self._full:
            return "cache"
        slab = self.cache.open(len(flight.tokens))
        if slab is None:
            return "cache"
        self.queue.charge(flight)
        self._entered += 1
        flight.slab, flight.admitted, flight.number = slab, now, self._entered
        if flight.adapter is not None:
            flight.slot = self.adapters.acquire(flight.adapter)
            self._in_use_since.setdefault(flight.adapter, now)
        if self.prefix is not None:
            self.prefix.restore(self._hashes(flight, len(flight.tokens) - 1), slab)
        if flight.cached_tokens is None:
            flight.cached_tokens, flight.queued = slab.length, now - flight.waiting_since
        self.running.append(flight)
        return None

    def remember(self, flight: Flight) -> None:
        """Keep what has been computed of a request in the prefix cache."""
        if self.prefix is not None and flight.slab is not None:
            self.prefix.keep(self._hashes(flight, flight.computed), flight.slab)

    def _hashes(self, flight: Flight, tokens: int) -> list[bytes]:
        assert self.prefix is not None
        request = flight.request
        return self.prefix.hashes(flight.tokens[:tokens], request.tenant, flight.adapter, request.strength)

    def _preempt(self, flight: Flight, now: float) -> None:
        self.preemptions += 1
        self._free(flight)
        flight.waiting_since = now
        self.queue.push(flight, first=True)

    def _free(self, flight: Flight) -> None:
        assert flight.slab is not None
        self.running.remove(flight)
        self.cache.close(flight.slab)
        flight.slab, flight.slot = None, BASE
        if flight.adapter is not None:
            self.adapters.release(flight.adapter)
            if not any(other.adapter == flight.adapter for other in self.running):
                del self._in_use_since[flight.adapter]


def _urgency(flight: Flight) -> tuple[int, int]:
    """Smaller = more urgent; no two running requests have the same."""
    return flight.request.priority, flight.number
