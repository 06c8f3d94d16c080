"""What the routes work with: who asks, what is served, and what the backend is doing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from starlette.requests import Request

from rayft.config.serve import Serve
from rayft.serve.backend import Backend, ModelCard, ReplicaState
from rayft.serve.cache import CachedBackend
from rayft.serve.errors import ApiError
from rayft.serve.keys import caller
from rayft.serve.limits import Limits
from rayft.serve.measure import Measure
from rayft.serve.names import NameCard, Names, Served, unknown
from rayft.serve.record import Record

log = logging.getLogger("rayft.serve")

STICKY_HEADER = "x-session-id"
"""Requests with the same value stay with one version of an alias; goes before the field `user`."""
LOADING = 2.0
"""Seconds that a request waits for the model before it is told to come back."""
_STATES_AGE = 5.0
"""Seconds after which what is known of the replicas is asked for again."""
_STATES_TIMEOUT = 10.0


class Gateway:
    """One per application."""

    def __init__(
        self,
        serve: Serve,
        backend: Backend,
        names: Names,
        *,
        keep_alive: float = 15.0,
        observers: Sequence[Callable[[Record], object]] = (),
        write_text: Callable[[dict[str, object]], object] | None = None,
    ) -> None:
        """keep_alive: seconds without an event after which a stream gets a comment. observers: called with the record
        of each request that has ended. write_text: called with prompts and answers, where they are to be kept."""
        self.cache = (
            CachedBackend(backend, serve.response_cache, serve.response_cache_ttl) if serve.response_cache else None
        )
        self.serve, self.backend, self.names, self.keep_alive = serve, self.cache or backend, names, keep_alive
        self.limits, self.measure = Limits(), Measure()
        self.write_text = write_text
        self.running: Counter[str] = Counter()
        """Requests that are being answered, by name."""
        self._observers = (self.measure.add, *observers)
        self._loading: asyncio.Task[ModelCard] | None = None
        self._states: list[ReplicaState] = []
        self._asked = -_STATES_AGE
        self._asking: asyncio.Task[list[ReplicaState]] | None = None

    async def card(self, patience: float = LOADING) -> ModelCard:
        """Of the base. Raises ApiError R838 while it is being loaded, and when it cannot be."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(self.backend.card())
        done, _ = await asyncio.wait([self._loading], timeout=patience)
        if not done:
            raise ApiError("R838", "the model is being loaded", "try again soon", retry_after=LOADING)
        if self._loading.cancelled() or self._loading.exception() is not None:
            failed, self._loading = self._loading, None
            log.error("the backend does not say what it serves: %s", "" if failed.cancelled() else failed.exception())
            raise ApiError("R838", "no engine answers", "try again soon", retry_after=LOADING)
        card = self._loading.result()
        self.measure.base = card.name
        return card

    async def states(self) -> list[ReplicaState]:
        """What the replicas are doing now. Raises ApiError R838 when they do not say."""
        try:
            self._states = await asyncio.wait_for(self.backend.states(), _STATES_TIMEOUT)
        except Exception as error:
            log.error("the engines do not say how they are", exc_info=error)
            raise ApiError("R838", "no engine answers", "try again soon", retry_after=LOADING) from error
        self._asked = time.monotonic()
        return self._states

    def cards(self, request: Request) -> list[NameCard]:
        """The names that the caller may use."""
        key = caller(request)
        return [card for card in self.names.cards() if key.allows(card.id)]

    def resolve(self, request: Request, model: str, user: str | None) -> Served:
        """Raises ApiError R831 with the names that the caller may use, R833."""
        try:
            served = self.names.resolve(model, request.headers.get(STICKY_HEADER) or user)
        except ApiError as error:
            if error.id != "R831":
                raise
            raise unknown(model, [card.id for card in self.cards(request)]) from None
        if not caller(request).allows(served.name):
            raise ApiError("R833", f"this API key may not use {model[:200]!r}", param="model")
        return served

    def ended(self, record: Record) -> None:
        """Tell everybody who counts. What fails there must not fail the request."""
        record = replace(
            record,
            memory=sum(state.memory for state in self._states) or None,
            gpu_memory=_sum([state.gpu_memory for state in self._states]),
            gpu_utilization=_mean([state.gpu_utilization for state in self._states]),
        )
        for observer in self._observers:
            try:
                observer(record)
            except Exception as error:
                log.error("a record was not taken", exc_info=error)
        if time.monotonic() - self._asked > _STATES_AGE and (self._asking is None or self._asking.done()):
            self._asked = time.monotonic()
            self._asking = asyncio.ensure_future(self.states())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
