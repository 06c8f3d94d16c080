"""One request on its way: what it may use, its flow of pieces, and the record that it leaves."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rayft.errors import RayftError
from rayft.inference.request import Usage
from rayft.serve.answers import total
from rayft.serve.errors import ApiError, status_of
from rayft.serve.flow import Flow
from rayft.serve.gateway import STICKY_HEADER, Gateway
from rayft.serve.job import Job
from rayft.serve.keys import caller
from rayft.serve.limits import Ticket
from rayft.serve.names import Served
from rayft.serve.record import Record

log = logging.getLogger("rayft.serve")

FINGERPRINT = 12
"""Hexadecimal digits of a content hash in `system_fingerprint`."""


class Exchange:
    """Use as an async context manager. Entering waits for the first pieces and raises what refuses the request; leaving
    cancels what still runs and tells the gateway how it went.

    Raises, when entered:
        ApiError: R831 (unknown model), R833 (not with this key), R834 (over a limit), R836 (time), R838 (no engine).
        UsageError, Overloaded: of the jobs and of the backend.
    """

    def __init__(
        self,
        gateway: Gateway,
        request: Request,
        *,
        route: str,
        prefix: str,
        model: str,
        user: str | None = None,
        priority: int = 0,
        jobs: Callable[[str, Served, str], Sequence[Job]],
        receive: Any = None,
    ) -> None:
        """prefix: of the id. jobs: of (id, what is served, tenant). receive: another one than the request's own."""
        self._gateway, self._request, self._make_jobs = gateway, request, jobs
        self._receive = receive or request.receive
        self._model, self._user, self._priority = model, user, priority
        self.id, self.created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self._began = time.monotonic()
        self.fingerprint: str | None = None
        self.headers: dict[str, str] = {"x-rayft-id": self.id}
        """Of the response; once entered, with what answered."""
        if "x-request-id" not in request.headers:  # else a proxy, such as Ray Serve's, gives it back
            self.headers["x-request-id"] = self.id
        key = caller(request)
        self.record = Record(
            id=self.id,
            route=route,
            model=model[:200],
            name="",
            version=None,
            content=None,
            tenant=key.owner,
            sticky=bool(request.headers.get(STICKY_HEADER) or user),
            stream=False,
            answers=0,
            max_tokens=None,
            time=time.time(),
        )
        self.flow: Flow
        self._ticket: Ticket | None = None
        self._counted = False

    async def __aenter__(self) -> Exchange:
        try:
            await self._enter()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def _enter(self) -> None:
        gateway, key, record = self._gateway, caller(self._request), self.record
        if self._priority < 0 and not key.admin:
            raise ApiError("R833", "a priority below 0 needs an admin key", param="priority")
        card = await gateway.card()
        served = gateway.resolve(self._request, self._model, self._user)
        hash = served.content.hash if served.content is not None else card.base_hash
        self.fingerprint = f"fp_{hash[:FINGERPRINT]}" if hash else None
        record.name, record.version = served.name, served.version
        if served.version is not None:
            self.headers["x-rayft-version"] = str(served.version)
        if served.content is not None:
            record.content = self.headers["x-rayft-content"] = served.content.hash
        jobs = self._make_jobs(self.id, served, key.owner)
        record.answers, record.stream = sum(job.n for job in jobs), jobs[0].stream
        record.max_tokens = None if jobs[0].open_end else jobs[0].sampling.max_new_tokens
        longest = card.max_model_len if record.max_tokens is None else record.max_tokens
        self._ticket = gateway.limits.enter(key, longest * record.answers)
        gateway.running[served.name] += 1
        self._counted = True
        if gateway.cache is not None and all(gateway.cache.knows(job) for job in jobs):
            record.from_cache = True
            self.headers["x-rayft-cache"] = "hit"
        keep_text = gateway.write_text is not None
        self.flow = Flow(gateway.backend, jobs, self._receive, gateway.serve.request_timeout, keep_text)
        await self.flow.__aenter__()
        await self.flow.begin()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        record, gateway = self.record, self._gateway
        usage = Usage(0, 0, 0)
        flow: Flow | None = getattr(self, "flow", None)
        if flow is not None:
            await flow.__aexit__(kind, error, trace)
            usage = total(flow)
            record.gaps = flow.gaps if record.stream else []
            if record.stream and flow.first_piece is not None:
                record.first_token = flow.first_piece - self._began
            record.finish_reasons = flow.finish_reasons
        if error is None:
            record.status = 200
            record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            record.cached_tokens = usage.cached_tokens
            record.queued = None if record.from_cache else usage.queued
        else:
            gone = not isinstance(error, Exception)  # cancelled: the server stops, or nobody waits any more
            record.status = 499 if gone else status_of(error)
            record.error = error.id if isinstance(error, RayftError) else "R837" if gone else "R000"
        if self._counted:
            gateway.running -= Counter({record.name: 1})  # names at 0 leave
        if self._ticket is not None:
            self._ticket.settle(usage.prompt_tokens + usage.completion_tokens)
        record.seconds = time.monotonic() - self._began
        gateway.ended(record)
        if gateway.write_text is not None and error is None and flow is not None:
            prompts = [_plain(job) for job in flow.jobs]
            line = {"id": self.id, "time": record.time, "model": record.model, "content": record.content}
            gateway.write_text({**line, "prompts": prompts, "answers": [flow.texts[i] for i in sorted(flow.texts)]})


class EventStream(Response):
    """Server-sent events of an exchange that was entered; it is left when the last event is sent, the client has gone,
    or the task is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(None, 200, {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._events = exchange, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed: BaseException | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._events) as events:  # type: ignore[type-var]
                try:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                except RayftError as error:  # its event was sent
                    failed = error
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            failed = ApiError("R837", "the client has gone")
        except Exception as error:
            log.error("a stream failed", exc_info=error)
            failed = error
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except BaseException as error:
            failed = error
            raise
        finally:
            await self._exchange.__aexit__(type(failed) if failed else None, failed, None)


def _plain(job: Job) -> Any:
    return asdict(job)["prompt"]
