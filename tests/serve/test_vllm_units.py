"""What of vLLM needs no vLLM: its refusals told apart, one load for all who ask, what it cannot serve.

The server here is a small real one with vLLM 0.32's routes, statuses and texts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rayft.errors import RayftError, RunFailed, UsageError
from rayft.inference.request import Overloaded, SamplingParams
from rayft.serve.job import Content, Job, Piece
from rayft.serve.vllm_adapters import name_of, unsupported
from rayft.serve.vllm_answer import VllmAnswer
from rayft.serve.vllm_backend import Facts, VllmBackend, VllmLimits

FACTS = Facts("tiny", None, "LlamaForCausalLM", "fp32", None, 1, 384)
TWO = SamplingParams(2)
A, B = 40, 41
"""Ids of two letters."""


class Vllm:
    """The routes of a vLLM that answers two letters, and what it was asked."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.loads: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.refusal: tuple[int, str] | None = None
        self.late: str | None = None
        """An error that comes when the stream has begun."""
        self.hangs = False
        self.hung_up = asyncio.Event()
        self.lora = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        routes = [web.get("/v1/models", self._models), web.post("/v1/completions", self._completions)]
        if self.lora:
            routes += [web.post("/v1/load_lora_adapter", self._load), web.post("/v1/unload_lora_adapter", self._unload)]
        app.add_routes(routes)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base", "parent": None, "max_model_len": 64, "created": 1}]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads.append(body["lora_name"])
        await asyncio.sleep(0.05)
        if body["lora_name"] in self.known:
            return _error(400, "The lora adapter 'x' has already been loaded.")
        self.known[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success: LoRA adapter 'x' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        return web.Response(text="Success") if self.known.pop(name, None) else _error(404, "cannot be found")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] not in ("base", *self.known):
            return _error(404, "The model `x` does not exist.")
        if self.refusal:
            return _error(*self.refusal)
        response = web.StreamResponse()
        await response.prepare(request)
        await self._send(response, {"choices": [{"index": 0, "text": "", "token_ids": [A]}]})
        if self.hangs:
            try:
                await asyncio.sleep(60)
            finally:
                self.hung_up.set()
        if self.late:
            await self._send(response, {"error": {"message": self.late, "code": 400}})
            return response
        end = {"index": 0, "text": "", "token_ids": [B], "finish_reason": "length"}
        await self._send(response, {"choices": [end]})
        usage = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "x", "param": None, "code": status}}, status=status)


async def collect(backend: VllmBackend, job: Job) -> list[Piece]:
    return [piece async for pieces in backend.generate(job) for piece in pieces]


def test_pieces_usage_and_greedy_answers(tokenizer: Any) -> None:
    async def main() -> tuple[list[Piece], dict[str, Any]]:
        vllm = Vllm()
        async with vllm.running() as url:
            backend = VllmBackend(url, tokenizer, FACTS)
            pieces = await collect(backend, Job("a", (5,), TWO, n=2, tenant="t"))
            await backend.close()
        return pieces, vllm.bodies[0]

    pieces, body = asyncio.run(main())
    for index in (0, 1):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == tokenizer.decode([A, B]) != ""
        assert mine[-1].finish_reason == "length"
        usage = mine[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (1, 2, 1)
    assert body["n"] == 1  # vLLM refuses several greedy answers
    assert body["cache_salt"] != "t" and len(body["cache_salt"]) == 64
    assert tokenizer.eos_token_id in body["stop_token_ids"]


def test_text_is_made_of_the_ids_and_ends_before_what_ended_it(tokenizer: Any) -> None:
    ids = tokenizer("pizza and Paris")["input_ids"]
    end = tokenizer.eos_token_id

    def answered(sampling: SamplingParams, *choices: dict[str, Any]) -> tuple[str, str | None, int]:
        answer = VllmAnswer(0, tokenizer, None, sampling)
        pieces = [piece for choice in choices for piece in answer.take({"index": 0, "text": "not this"} | choice)]
        last = answer.end(1, 0)
        assert last.usage is not None
        return "".join(piece.text for piece in (*pieces, last)), last.finish_reason, last.usage.completion_tokens

    first, rest = {"token_ids": ids[:2]}, {"token_ids": [*ids[2:], end], "finish_reason": "stop", "stop_reason": None}
    assert answered(TWO, first, rest) == ("pizza and Paris", "stop", len(ids) + 1)
    word = {"token_ids": ids, "finish_reason": "stop", "stop_reason": ids[-1]}
    assert answered(TWO, word) == (tokenizer.decode(ids[:-1]), "stop", len(ids))
    stop = SamplingParams(2, stop=(" and",))
    text, reason, tokens = answered(stop, {"token_ids": ids, "finish_reason": "length"})
    assert (text, reason) == ("pizza", "stop") and tokens < len(ids)
    half = tokenizer("\N{PILE OF POO}")["input_ids"][:1]
    assert answered(TWO, {"token_ids": half, "finish_reason": "length"})[0] == "\N{REPLACEMENT CHARACTER}"
    assert answered(TWO, {"token_ids": ids})[1] == "error"


def test_an_adapter_is_loaded_once_and_again_when_vllm_has_lost_it(
    tokenizer: Any, contents: dict[str, Content]
) -> None:
    anna = contents["anna"]

    async def main() -> None:
        vllm = Vllm()
        async with vllm.running() as url:
            backend = VllmBackend(url, tokenizer, FACTS)
            jobs = [Job(str(number), (5,), TWO, anna) for number in range(8)]
            await asyncio.gather(*(collect(backend, job) for job in jobs))
            assert vllm.loads == [name_of(anna.hash)]
            assert vllm.known == {name_of(anna.hash): anna.path}
            vllm.known.clear()  # it was started again
            await collect(backend, jobs[0])
            assert len(vllm.loads) == 2
            await backend.unload(anna.hash)
            assert not vllm.known and backend.loaded == ()
            vllm.known[name_of(anna.hash)] = anna.path  # of a server before this one
            await collect(backend, jobs[0])
            assert backend.loaded == (anna.hash,)
            await backend.close()

    asyncio.run(main())


def test_an_unloaded_adapter_goes_when_nobody_uses_it(tokenizer: Any, contents: dict[str, Content]) -> None:
    anna = contents["anna"]

    async def main() -> None:
        vllm = Vllm()
        vllm.hangs = True
        async with vllm.running() as url:
            backend = VllmBackend(url, tokenizer, FACTS)
            pieces = backend.generate(Job("a", (5,), TWO, anna))
            await anext(pieces)
            await backend.unload(anna.hash)
            assert vllm.known
            await pieces.aclose()
            assert not vllm.known
            await asyncio.wait_for(vllm.hung_up.wait(), 5)  # who hangs up cancels the request
            assert backend.queued_tokens == 0
            await backend.close()

    asyncio.run(main())


def test_refusals_have_our_ids(tokenizer: Any, contents: dict[str, Content], tmp_path: Path) -> None:
    moved = replace(contents["anna"], path=contents["bert"].path)
    cases: list[tuple[str, type[RayftError], Job, tuple[int, str] | None]] = [
        ("R811", UsageError, Job("a", (5,), TWO), (400, "Token id 600 is out of vocabulary")),
        ("R813", Overloaded, Job("a", (5,), TWO), (503, "busy")),
        ("R839", RunFailed, Job("a", (5,), TWO), (500, "broken")),
        ("R812", UsageError, Job("a", (5,), SamplingParams(64)), None),
        ("R812", UsageError, Job("a", tuple(range(40)), TWO), None),
        ("R866", UsageError, Job("a", (5,), TWO, contents["anna"], 0.5), None),
        ("R866", UsageError, Job("a", (5,), TWO, contents["hugo"]), None),
        ("R819", UsageError, Job("a", (5,), TWO, moved), None),
    ]

    async def main() -> None:
        vllm = Vllm()
        async with vllm.running() as url:
            backend = VllmBackend(url, tokenizer, FACTS, limits=VllmLimits(32, 100, 16))
            for id, kind, job, vllm.refusal in cases:
                with pytest.raises(kind, match=id):
                    await collect(backend, job)
                assert backend.queued_tokens == 0
            vllm.refusal, vllm.late = None, "too late"
            with pytest.raises(UsageError, match=r"R811.*too late"):
                await collect(backend, Job("a", (5,), TWO))
            vllm.late, backend.queued_tokens = None, 101
            with pytest.raises(Overloaded, match="R813"):
                await collect(backend, Job("a", (5,), TWO))
            await backend.close()
        with pytest.raises(UsageError, match="R867"):
            await VllmBackend(url, tokenizer, FACTS).card()
        bare = Vllm()
        bare.lora = False
        async with bare.running() as url:
            backend = VllmBackend(url, tokenizer, FACTS)
            with pytest.raises(UsageError, match=r"R867.*loads no adapters"):
                await backend.load(contents["anna"])
            await backend.close()
            based = VllmBackend(url, tokenizer, FACTS, zero=contents["anna"])
            assert (await collect(based, Job("a", (5,), TWO)))[-1].finish_reason == "length"
            assert bare.bodies[-1]["model"] == "base"
            await based.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None),
        ({"use_rslora": True, "rank_pattern": {"q": 4}, "init_lora_weights": "gaussian"}, None),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["score"]}, None),
        ({"trainable_token_indices": [1]}, "rows"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"rank": 17}, "rank is 17"),
    ],
)
def test_what_vllm_cannot_serve_is_known_before(more: dict[str, Any], reason: str | None) -> None:
    rank = more.pop("rank", 4)
    found = unsupported({"peft_type": "LORA", "bias": "none", **more}, rank, 16)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
