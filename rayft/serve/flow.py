"""What comes back for one HTTP request: the pieces of all its jobs, until the end, a limit or a hang-up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from rayft.errors import RayftError
from rayft.inference.request import Usage
from rayft.serve.backend import Backend
from rayft.serve.errors import ApiError
from rayft.serve.job import Job, Piece

log = logging.getLogger("rayft.serve")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Flow:
    """Use as an async context manager: whatever still runs when the block ends is cancelled.

    The answers of all jobs are numbered through: answer j of job i is i * n + j.
    """

    def __init__(
        self,
        backend: Backend,
        jobs: Sequence[Job],
        receive: Receive,
        timeout: float | None = None,
        keep_text: bool = False,
    ) -> None:
        """receive: ASGI's, after the body was read: it tells when the client has gone. timeout: seconds."""
        self.jobs = jobs
        self.answers = sum(job.n for job in jobs)
        self.usage: dict[int, Usage] = {}
        """By answer, of those that have ended."""
        self.texts: dict[int, str] = {}
        """By answer, where they are to be kept."""
        self._finished: dict[int, str] = {}
        self._keep_text = keep_text
        self._backend, self._receive = backend, receive
        self._timeout = timeout
        self._ends_at = None if timeout is None else time.monotonic() + timeout
        self._arrived: dict[int, Piece] = {}
        """By answer: all that came since the last look, as one piece."""
        self._failed: BaseException | None = None
        self._silent = len(jobs)
        """Jobs that have given nothing yet, not even an error."""
        self._running = len(jobs)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.first_piece: float | None = None
        """When the first one came, by `time.monotonic`; of a job that is not streamed it is the whole answer."""
        self.gaps: list[float] = []
        """Seconds between the pieces of each job."""
        self._last: dict[int, float] = {}

    async def __aenter__(self) -> Flow:
        self._tasks.append(asyncio.create_task(self._watch()))
        self._tasks += [asyncio.create_task(self._pump(number)) for number in range(len(self.jobs))]
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def finish_reasons(self) -> list[str]:
        """Of the answers that have ended."""
        return [self._finished[i] for i in sorted(self._finished)]

    async def begin(self) -> None:
        """Wait until every job has given something, so that a refusal still gets its own status.

        Raises what `Backend.generate` does, and ApiError R836 (the time is over), R837 (the client has gone).
        """
        while self._silent and self._failed is None:
            await self._sleep(None)
        self._check()

    async def take(self, longest: float | None = None) -> list[Piece] | None:
        """What has come since the last call, at most one piece per answer; [] when nothing did for ``longest`` seconds;
        None after the end. Raises as `begin` does, and ApiError R838, R839 when the engine ended an answer."""
        if not self._arrived and self._running and self._failed is None:
            await self._sleep(longest)
        pieces, self._arrived = [self._arrived[i] for i in sorted(self._arrived)], {}
        for piece in pieces:
            if piece.finish_reason in ("error", "cancelled"):
                raise _ended(piece)
            if piece.usage is not None:
                self.usage[piece.index] = piece.usage
                self._finished[piece.index] = piece.finish_reason or "stop"
            if self._keep_text:
                self.texts[piece.index] = self.texts.get(piece.index, "") + piece.text
        if pieces:
            return pieces
        self._check()
        if self._running:
            return []
        if len(self.usage) < self.answers:
            raise ApiError("R839", "the engine stopped before its answer was whole")
        return None

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    async def _sleep(self, longest: float | None) -> None:
        """Until something happens."""
        left = None if self._ends_at is None else self._ends_at - time.monotonic()
        limits = [limit for limit in (longest, left) if limit is not None]
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), max(0.0, min(limits)) if limits else None)
        except TimeoutError:
            if left is not None and (longest is None or left <= longest):
                self._failed = self._failed or ApiError("R836", f"no answer within {self._timeout:g} seconds")

    async def _pump(self, number: int) -> None:
        job, silent = self.jobs[number], True
        items = self._backend.generate(job)
        try:
            async for item in items:
                for piece in item:
                    index = number * job.n + piece.index
                    self._arrived[index] = joined(self._arrived.get(index), replace(piece, index=index))
                self._measure(number)
                if silent:
                    silent, self._silent = False, self._silent - 1
                self._wake.set()
        except RayftError as error:
            self._failed = self._failed or error
        except Exception as error:  # a replica that died, or a defect
            log.error("the engine failed", exc_info=error)
            self._failed = self._failed or _broken()
        finally:
            self._silent -= silent
            self._running -= 1
            self._wake.set()
            if (close := getattr(items, "aclose", None)) is not None:
                await close()

    def _measure(self, number: int) -> None:
        now = time.monotonic()
        if self.first_piece is None:
            self.first_piece = now
        if number in self._last:
            self.gaps.append(now - self._last[number])
        self._last[number] = now

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._failed = self._failed or ApiError("R837", "the client has gone")
        self._wake.set()


def joined(before: Piece | None, piece: Piece) -> Piece:
    """Two pieces of one answer as one."""
    if before is None:
        return piece
    return replace(
        piece,
        text=before.text + piece.text,
        tokens=before.tokens + piece.tokens,
        tool_calls=before.tool_calls + piece.tool_calls,
    )


def shared(receive: Receive) -> Receive:
    """ASGI's receive for several flows of one request: each learns when the client has gone."""
    gone: asyncio.Future[MutableMapping[str, Any]] | None = None

    async def wait() -> MutableMapping[str, Any]:
        nonlocal gone
        if gone is None:
            gone = asyncio.ensure_future(receive())
        return await asyncio.shield(gone)

    return wait


def _ended(piece: Piece) -> ApiError:
    if piece.finish_reason == "cancelled":
        return ApiError("R838", "the server ended this request, since it stops", "send it again")
    log.error("the engine failed: %s", piece.error)
    return _broken()


def _broken() -> ApiError:
    return ApiError("R839", "the engine failed while it answered", "the server's log says why")
