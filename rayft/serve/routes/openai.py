"""OpenAI's routes: chat, completions and models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rayft.serve import replies
from rayft.serve.answers import Frame, body, chunks, total, whole
from rayft.serve.asking import chat_jobs, completion_jobs
from rayft.serve.errors import json_response
from rayft.serve.exchange import EventStream, Exchange
from rayft.serve.gateway import Gateway
from rayft.serve.names import NameCard, unknown
from rayft.serve.protocol import ChatRequest, CompletionRequest, Generation


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.post("/chat/completions", responses=replies.streamed(replies.Chat))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        exchange = Exchange(
            gateway,
            request,
            route="chat",
            prefix="chatcmpl",
            model=asked.model,
            user=asked.user,
            priority=asked.priority or 0,
            jobs=lambda id, served, tenant: chat_jobs(asked, id, served, tenant),
        )
        frame = Frame("chat", exchange, asked.model, bool(asked.logprobs), asked.parallel_tool_calls is False)
        return await _answer(exchange, frame, asked, gateway.keep_alive)

    @routes.post("/completions", responses=replies.streamed(replies.Completion))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        exchange = Exchange(
            gateway,
            request,
            route="completions",
            prefix="cmpl",
            model=asked.model,
            user=asked.user,
            priority=asked.priority or 0,
            jobs=lambda id, served, tenant: completion_jobs(asked, id, served, tenant),
        )
        echo = tuple(str(prompt) for prompt in asked.prompts for _ in range(asked.n or 1)) if asked.echo else ()
        frame = Frame("text", exchange, asked.model, asked.logprobs is not None, echo=echo)
        return await _answer(exchange, frame, asked, gateway.keep_alive)

    @routes.get("/models", responses={200: {"model": replies.Models}})
    async def models(request: Request) -> Response:
        """The base and the adapters."""
        longest = (await gateway.card()).max_model_len
        data = [_entry(card, longest) for card in gateway.cards(request)]
        return json_response({"object": "list", "data": data})

    @routes.get("/models/{id:path}", responses={200: {"model": replies.Model}})
    async def model(id: str, request: Request) -> Response:
        """One of them."""
        cards = gateway.cards(request)
        longest = (await gateway.card()).max_model_len
        for card in cards:
            if card.id == id:
                return json_response(_entry(card, longest))
        raise unknown(id, [card.id for card in cards])

    return routes


async def _answer(exchange: Exchange, frame: Frame, asked: Generation, keep_alive: float) -> Response:
    if ignored := asked.ignored():
        exchange.headers["x-rayft-ignored"] = ", ".join(ignored)
    if asked.stream:
        await exchange.__aenter__()
        with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        events = chunks(frame, exchange.flow, with_usage, keep_alive)
        return EventStream(exchange, events, exchange.headers)
    async with exchange:
        answers = await whole(exchange.flow)
        return json_response(body(frame, answers, total(exchange.flow)), headers=exchange.headers)


def _entry(card: NameCard, max_model_len: int) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "rayft",
        "root": card.root,
        "parent": card.parent,
        "max_model_len": max_model_len,
    }
