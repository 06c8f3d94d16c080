"""Whether the server lives, and what it has done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from rayft.serve import replies
from rayft.serve.errors import ApiError, json_response
from rayft.serve.gateway import Gateway
from rayft.serve.keys import caller
from rayft.serve.parameters import count
from rayft.serve.record import Record
from rayft.serve.summary import summary

WINDOW = 10_000
"""Requests that the summary can look back on."""


class Recent:
    """The lines of the last requests."""

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        """lines: of requests before the server started."""
        self.lines: deque[dict[str, Any]] = deque(lines, maxlen=WINDOW)

    def add(self, record: Record) -> None:
        self.lines.append(record.line())


def health_router(gateway: Gateway) -> APIRouter:
    """What anybody may ask."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health", responses={200: {"model": replies.Status}})
    async def health() -> Response:
        """200 when the model is loaded and the engines answer, else 503."""
        await gateway.card(patience=0.5)
        if not await gateway.states():
            raise ApiError("R838", "no engine answers", "try again soon")
        return json_response({"status": "ok"})

    @routes.get("/ready", responses={200: {"model": replies.Status}})
    async def ready() -> Response:
        """200 when a request would be taken now, else 503."""
        await gateway.card(patience=0.5)
        if all(state.queued_tokens > gateway.serve.max_queued_tokens for state in await gateway.states()):
            raise ApiError("R838", "too much is waiting", "try again soon")
        return json_response({"status": "ready"})

    return routes


def router(gateway: Gateway, recent: Recent) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """For Prometheus. What the engines do is left out while they do not answer."""
        try:
            states = await gateway.states()
        except ApiError:
            states = []
        return Response(gateway.measure.text(states, +gateway.running), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/performance_summary", responses={200: {"model": replies.Summary}})
    async def performance_summary(
        request: Request, window: Annotated[int, Query(ge=1, le=WINDOW, description="Requests to look back on.")] = 100
    ) -> Response:
        """Means and percentiles over the last requests; a key that is not an admin's sees its tenant's."""
        key = caller(request)
        lines = [line for line in recent.lines if key.admin or line["tenant"] == key.owner]
        return json_response(summary(lines[-window:]))

    @routes.get("/model_info", responses={200: {"model": replies.ModelInfo}})
    async def model_info(request: Request, model: str | None = None) -> Response:
        """The base, or one adapter on it."""
        card = await gateway.card()
        name = model or next((card.id for card in gateway.names.cards() if card.parent is None), card.name)
        served = gateway.resolve(request, name, "model_info")
        own = None if served.content is None else count(served.content.path)
        return json_response(
            {
                "model": name,
                "base": card.name,
                "architecture": card.architecture,
                "dtype": card.dtype,
                "quantization": card.quantization,
                "parameters": card.parameters,
                "adapter_parameters": own,
                "total_parameters": card.parameters + (own or 0),
                "vocabulary": card.vocabulary,
                "max_model_len": card.max_model_len,
                "content": served.content.hash if served.content is not None else card.base_hash,
                "version": served.version,
                "adapters": [known.id for known in gateway.cards(request) if known.parent is not None],
            }
        )

    return routes
