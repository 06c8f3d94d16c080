"""The HTTP application: routes over a backend. It knows neither Ray nor torch, and holds no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.security import HTTPBearer

from rayft import __version__
from rayft.config.serve import Serve
from rayft.serve import errors, replies
from rayft.serve.backend import Backend
from rayft.serve.gateway import Gateway
from rayft.serve.guard import MAX_BODY, Guard, is_loopback
from rayft.serve.journal import REQUESTS, TEXTS, Journal, Texts
from rayft.serve.keys import Keys
from rayft.serve.names import Names
from rayft.serve.record import Record
from rayft.serve.routes import openai, operations, page, plain


def build(
    serve: Serve,
    backend: Backend,
    names: Names,
    *,
    folder: str | Path | None = None,
    routers: Sequence[APIRouter] = (),
    statuses: Mapping[str, int] | None = None,
    observers: Sequence[Callable[[Record], object]] = (),
    meanwhile: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    max_body: int = MAX_BODY,
    keep_alive: float = 15.0,
) -> FastAPI:
    """An application for uvicorn or a Ray Serve ingress.

    folder: for `requests.jsonl` and `texts.jsonl`; None = nothing is written. routers: more routes. statuses: of the
    errors that these raise, by id, where they are not 400. observers: called with the record of each request that has
    ended. meanwhile: run as long as the application does. max_body: bytes. keep_alive: seconds without an event after
    which a stream gets a comment.

    Raises:
        UsageError: R844, the file of API keys cannot be read.
    """
    journal = Journal(Path(folder, REQUESTS)) if folder is not None and serve.log_requests else None
    recent = operations.Recent(journal.tail(operations.WINDOW) if journal else ())
    told = [recent.add, *observers]
    if journal is not None:
        told.append(lambda record: journal.append(record.line()))
    texts = Texts(Path(folder, TEXTS), serve.log_text_days) if folder is not None and serve.log_text else None
    gateway = Gateway(
        serve,
        backend,
        names,
        keep_alive=keep_alive,
        observers=told,
        write_text=None if texts is None else texts.append,
    )
    keys = None if serve.api_keys is None else Keys(serve.api_keys)
    app = FastAPI(
        title="rayft",
        version=__version__,
        # The interactive pages would fetch their scripts from the internet.
        docs_url=None,
        redoc_url=None,
        lifespan=_running(meanwhile),
    )
    app.add_middleware(Guard, keys=keys, max_body=max_body, only_local=is_loopback(serve.host))
    errors.install(app, statuses)
    app.include_router(operations.health_router(gateway), responses=replies.ERRORS)
    app.include_router(page.router())
    # The guard checks the key; this is for /openapi.json.
    bearer = [] if keys is None else [Security(HTTPBearer(auto_error=False))]
    for router in (openai.router(gateway), plain.router(gateway), operations.router(gateway, recent), *routers):
        app.include_router(router, responses=replies.ERRORS, dependencies=bearer)
    return app


def _running(
    works: Sequence[Callable[[], Coroutine[Any, Any, None]]],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in works]
        yield
        for task in tasks:
            task.cancel()

    return lifespan
