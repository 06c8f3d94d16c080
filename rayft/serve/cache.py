"""Answers to requests that come again."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from rayft.serve.backend import Backend, ModelCard, ReplicaState
from rayft.serve.flow import joined
from rayft.serve.job import Content, Job, Piece

_WHOLE = ("stop", "length", "tool_calls")


@dataclass(frozen=True)
class _Kept:
    pieces: tuple[Piece, ...]
    """One per answer."""
    until: float


class CachedBackend:
    """A `Backend` that answers what it has answered before: greedy and seeded jobs, for as long as ``ttl`` seconds.

    Two jobs are the same when tenant, adapter content, strength, prompt, grammar, number of answers and every field of
    the sampling are.
    """

    def __init__(self, backend: Backend, size: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        """size: jobs whose answers are kept; the least recently asked for goes first."""
        self.backend, self.size, self.ttl, self.clock = backend, size, ttl, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def knows(self, job: Job) -> bool:
        return self._find(job) is not None

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        """See `Backend.generate`; an answer that was kept comes in one item."""
        if (kept := self._find(job)) is not None:
            yield kept.pieces
            return
        answers: dict[int, Piece] = {}
        items = self.backend.generate(job)
        try:
            async for item in items:
                if _repeatable(job):
                    for piece in item:
                        answers[piece.index] = joined(answers.get(piece.index), piece)
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        if len(answers) == job.n and all(piece.finish_reason in _WHOLE for piece in answers.values()):
            key = _key(job)
            self._kept[key] = _Kept(tuple(answers[i] for i in sorted(answers)), self.clock() + self.ttl)
            self._kept.move_to_end(key)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)

    async def card(self) -> ModelCard:
        return await self.backend.card()

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        await self.backend.load(content, pinned)

    async def unload(self, hash: str) -> None:
        await self.backend.unload(hash)

    async def states(self) -> list[ReplicaState]:
        return await self.backend.states()

    def _find(self, job: Job) -> _Kept | None:
        if not _repeatable(job):
            return None
        key = _key(job)
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until < self.clock():
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return kept


def _repeatable(job: Job) -> bool:
    return job.sampling.greedy or job.sampling.seed is not None


def _key(job: Job) -> str:
    """All of the job but what does not change its answer."""
    same = replace(job, id="", stream=False, priority=0)
    return hashlib.sha256(repr(same).encode("utf-8", "replace")).hexdigest()
