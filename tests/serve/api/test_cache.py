"""The response cache: what comes again is answered at once, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from rayft.config.serve import Serve
from rayft.inference.grammar import Grammar
from rayft.inference.request import SamplingParams, Usage
from rayft.serve import keys
from rayft.serve.cache import CachedBackend
from rayft.serve.job import Content, Conversation, Job, Piece
from rayft.serve.names import FixedNames
from tests.serve.api.conftest import BASE, World

CHAT = "/v1/chat/completions"
ASK = {"model": "anna", "messages": [{"role": "user", "content": "Answer"}], "max_tokens": 6, "temperature": 0}
ON = Serve(response_cache=100)


def test_what_comes_again_is_answered_from_the_cache(server_of: Callable[..., str], world: World) -> None:
    with httpx.Client(base_url=server_of(ON), timeout=30) as http:
        first = http.post(CHAT, json=ASK)
        computed = world.replica.engine.counters.steps
        again = http.post(CHAT, json=ASK)
        assert world.replica.engine.counters.steps == computed
        assert "x-rayft-cache" not in first.headers and again.headers["x-rayft-cache"] == "hit"
        assert again.json()["choices"] == first.json()["choices"] and again.json()["usage"] == first.json()["usage"]
        assert again.json()["id"] != first.json()["id"]
        stream = http.post(CHAT, json=ASK | {"stream": True})
        assert stream.headers["x-rayft-cache"] == "hit" and stream.text.endswith("data: [DONE]\n\n")
        others: list[dict[str, Any]] = [
            {"model": "bert"}, {"model": "tiny"}, {"max_tokens": 5}, {"stop": "x"}, {"lora_strength": 0.5}, {"n": 2},
            {"temperature": 1}, {"logprobs": True}, {"min_tokens": 1}, {"presence_penalty": 1},
            {"messages": [{"role": "user", "content": "answer"}]},
        ]  # fmt: skip
        for fields in others:
            assert "x-rayft-cache" not in http.post(CHAT, json=ASK | fields).headers, fields
        seeded = ASK | {"temperature": 1, "seed": 4}
        assert http.post(CHAT, json=seeded).json()["choices"] == http.post(CHAT, json=seeded).json()["choices"]
        assert http.post(CHAT, json=seeded).headers["x-rayft-cache"] == "hit"
        unseeded = ASK | {"temperature": 1}
        assert "x-rayft-cache" not in http.post(CHAT, json=unseeded).headers


def test_the_cache_never_crosses_tenants_or_contents(
    server_of: Callable[..., str], tmp_path: Path, world: World
) -> None:
    file = tmp_path / "keys.json"
    anna, bert, twin = keys.add(file, "anna"), keys.add(file, "bert"), keys.add(file, "twin", tenant="anna")

    class Moving(FixedNames):
        content = world.adapters["anna"]

        def resolve(self, model: str, sticky: str | None) -> Any:
            return replace(super().resolve(model, sticky), content=self.content)

    names = Moving(BASE, world.adapters)
    with httpx.Client(
        base_url=server_of(Serve(response_cache=100, api_keys=str(file)), names=names), timeout=30
    ) as http:

        def ask(key: str) -> httpx.Response:
            return http.post(CHAT, json=ASK, headers={"authorization": f"Bearer {key}"})

        first = ask(anna)
        assert "x-rayft-cache" not in ask(bert).headers
        assert ask(twin).headers["x-rayft-cache"] == "hit"
        Moving.content = world.adapters["bert"]  # the same name has another content
        other = ask(anna)
        assert "x-rayft-cache" not in other.headers and other.json()["choices"] != first.json()["choices"]


class Counting:
    """A backend that counts what it is asked; the tests of keys and time need no model."""

    def __init__(self, finish: Any = "stop") -> None:
        self.asked, self.finish = 0, finish

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        self.asked += 1
        yield [Piece(0, "a")]
        yield [Piece(0, "b", finish_reason=self.finish, usage=Usage(1, 2, 0))]


async def text(backend: CachedBackend, job: Job) -> str:
    return "".join([piece.text async for item in backend.generate(job) for piece in item])


JOB = Job("1", "x", SamplingParams())


def test_every_field_of_a_job_counts() -> None:
    async def main() -> None:
        changes: list[dict[str, Any]] = [
            {"tenant": "other"}, {"strength": 0.5}, {"adapter": Content("1" * 64, "p")}, {"prompt": (1,)},
            {"prompt": Conversation(({"role": "user", "content": "x"},))}, {"grammar": Grammar("json_object")},
            {"n": 2}, {"open_end": True},
        ]  # fmt: skip
        values = {
            "max_new_tokens": 5, "temperature": 1.0, "top_k": 1, "top_p": 0.5, "min_p": 0.5, "seed": 1, "stop": ("x",),
            "ignore_eos": True, "stop_token_ids": (1,), "logit_bias": {1: 1.0}, "repetition_penalty": 2.0,
            "presence_penalty": 1.0, "frequency_penalty": 1.0, "min_tokens": 1, "logprobs": True, "top_logprobs": 1,
        }  # fmt: skip
        assert set(values) == set(SamplingParams.__dataclass_fields__)
        changes += [{"sampling": replace(JOB.sampling, **{name: value})} for name, value in values.items()]
        backend = CachedBackend(Counting(), 100, 60)  # type: ignore[arg-type]
        await text(backend, JOB)
        for change in changes:
            assert not backend.knows(replace(JOB, **change)), change
        for change in ({"id": "2"}, {"stream": False}, {"priority": 3}):
            assert backend.knows(replace(JOB, **change)), change

    asyncio.run(main())


def test_time_size_and_broken_answers() -> None:
    async def main() -> None:
        now = [0.0]
        inner = Counting()
        backend = CachedBackend(inner, 2, 60, clock=lambda: now[0])  # type: ignore[arg-type]
        jobs = [replace(JOB, prompt=name) for name in "abc"]
        assert await text(backend, jobs[0]) == await text(backend, jobs[0]) == "ab" and inner.asked == 1
        await text(backend, jobs[1]), await text(backend, jobs[0]), await text(backend, jobs[2])
        assert [backend.knows(job) for job in jobs] == [True, False, True]  # b was not asked for for longest
        now[0] = 61
        assert not any(backend.knows(job) for job in jobs)
        for reason in ("error", "cancelled", None):
            broken = CachedBackend(Counting(reason), 2, 60)  # type: ignore[arg-type]
            await text(broken, JOB)
            assert not broken.knows(JOB)
        left = CachedBackend(Counting(), 2, 60)  # type: ignore[arg-type]
        items = left.generate(JOB)
        await anext(items)
        await items.aclose()  # type: ignore[attr-defined]
        assert not left.knows(JOB)

    asyncio.run(main())
