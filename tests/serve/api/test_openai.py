"""OpenAI's routes, with the official client, over a real engine."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import httpx_sse
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from rayft.config.serve import Serve
from rayft.inference.settings import EngineSettings
from rayft.serve import replies
from rayft.serve.replica import Replica
from tests.conftest import CORPUS
from tests.inference.oracle import sharpened
from tests.serve.api.conftest import World

ASK = [{"role": "user", "content": "Please order two pizzas"}]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 8} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(http: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, whose framing is checked on the way."""
    body = {"model": "tiny", "stream": True, "max_tokens": 8} | fields
    with httpx_sse.connect_sse(http, "POST", path, json=body) as source:
        data = [event.data for event in source.iter_sse()]
    assert data.pop() == "[DONE]"
    return [httpx.Response(200, text=item).json() for item in data]


def test_a_chat(client: openai.OpenAI, http: httpx.Client) -> None:
    body = chat(http, temperature=0)
    answer = ChatCompletion.model_validate(body)
    replies.Chat.model_validate(body)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.system_fingerprint == "fp_" + "b" * 12
    same = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    assert same.choices[0].message.content == answer.choices[0].message.content
    assert same.id != answer.id and same._request_id == same.id
    proxied = http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 1}, headers={"x-request-id": "7"}
    )
    assert proxied.headers["x-rayft-id"] == proxied.json()["id"] and "x-request-id" not in proxied.headers


def test_adapters_answer_under_their_names_and_hashes(http: httpx.Client, world: World) -> None:
    texts = {
        model: chat(http, model=model, temperature=0)["choices"][0]["message"]["content"]
        for model in ("tiny", "anna", "bert", "carl")
    }
    assert len(set(texts.values())) == 4
    hash = world.adapters["bert"].hash
    response = http.post(
        "/v1/chat/completions", json={"model": hash, "messages": ASK, "max_tokens": 8, "temperature": 0}
    )
    assert response.json()["choices"][0]["message"]["content"] == texts["bert"]
    assert response.json()["system_fingerprint"] == f"fp_{hash[:12]}"
    assert response.headers["x-rayft-content"] == hash
    half = chat(http, model="bert", temperature=0, lora_strength=0)
    assert half["choices"][0]["message"]["content"] == texts["tiny"]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, http: httpx.Client) -> None:
    whole = chat(http, model="anna", temperature=0, max_tokens=24)
    raw = events(http, "/v1/chat/completions", model="anna", messages=ASK, temperature=0, max_tokens=24,
                 stream_options={"include_usage": True})  # fmt: skip
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in raw]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    first, *between, last, usage = chunks
    assert raw[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert raw[-2]["choices"][0]["delta"] == {} and last.choices[0].finish_reason == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *between])
    assert (
        usage.choices == []
        and usage.usage is not None
        and usage.usage.model_dump() == usage.usage.model_validate(whole["usage"]).model_dump()
    )
    assert all(chunk["usage"] is None for chunk in raw[:-1])
    assert "".join(c.choices[0].delta.content or "" for c in between) == whole["choices"][0]["message"]["content"]
    parts = client.chat.completions.create(model="anna", messages=ASK, temperature=0, max_tokens=24, stream=True)  # type: ignore[arg-type]
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole["choices"][0]["message"]["content"]


def test_completions_take_texts_and_ids_one_or_many(http: httpx.Client, world: World) -> None:
    ids = world.tokenizer("What is the capital")["input_ids"]
    texts = set()
    for prompt in ("What is the capital", ["What is the capital"], ids, [ids]):
        body = http.post("/v1/completions", json={"model": "bert", "prompt": prompt, "temperature": 0}).json()
        answer = Completion.model_validate(body)
        replies.Completion.model_validate(body)
        assert answer.usage is not None and answer.usage.completion_tokens == 16
        texts.add(answer.choices[0].text)
    assert len(texts) == 1
    many = http.post(
        "/v1/completions",
        json={"model": "bert", "prompt": ["What is the capital", "Answer"], "n": 2, "temperature": 0, "max_tokens": 4},
    ).json()
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["choices"][0]["text"] == many["choices"][1]["text"] != many["choices"][2]["text"]
    assert texts.pop().startswith(many["choices"][0]["text"])
    prompts = len(ids) + len(world.tokenizer("Answer")["input_ids"])
    assert many["usage"]["prompt_tokens"] == prompts and many["usage"]["completion_tokens"] == 16


def test_echo(http: httpx.Client) -> None:
    plain = {"model": "tiny", "prompt": "Sure!", "temperature": 0, "max_tokens": 5}
    without = http.post("/v1/completions", json=plain).json()["choices"][0]["text"]
    assert http.post("/v1/completions", json=plain | {"echo": True}).json()["choices"][0]["text"] == f"Sure!{without}"
    chunks = events(http, "/v1/completions", **plain, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f"Sure!{without}"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_several_answers_differ_and_a_seed_brings_them_back(http: httpx.Client) -> None:
    asked = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    first, again = chat(http, **asked), chat(http, **asked)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]] and len(set(texts)) > 1
    chunks = events(http, "/v1/chat/completions", messages=ASK, **asked)
    for index, text in enumerate(texts):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "length"
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
    assert first["usage"]["completion_tokens"] == 36
    assert first["usage"]["prompt_tokens"] == chat(http)["usage"]["prompt_tokens"]


def test_stop_texts(http: httpx.Client) -> None:
    text = chat(http, temperature=0, max_tokens=30)["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:3]
    choice = chat(http, temperature=0, max_tokens=30, stop=stop)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == text[: text.index(stop)]


def test_logprobs(http: httpx.Client) -> None:
    choice = chat(http, temperature=0, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 8 and all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0 for entry in content)
    streamed = [
        entry
        for chunk in events(http, "/v1/chat/completions", messages=ASK, temperature=0, logprobs=True, top_logprobs=2)
        for entry in ((chunk["choices"][0]["logprobs"] or {}).get("content") or [])
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    body = http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "Sure", "temperature": 0, "logprobs": 1}
    ).json()
    table = Completion.model_validate(body).choices[0].logprobs
    assert table is not None and table.tokens is not None and table.text_offset is not None
    assert table.text_offset == [len("".join(table.tokens[:i])) for i in range(len(table.tokens))]
    assert all(set(top) == {token} for top, token in zip(table.top_logprobs or [], table.tokens, strict=True))


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    body = http.get("/v1/models").json()
    assert [Model.model_validate(entry).id for entry in body["data"]] == ["tiny", "anna", "bert", "carl"]
    assert body["data"][0]["parent"] is None and body["data"][1]["parent"] == "tiny"
    assert client.models.retrieve("anna").id == "anna"
    assert [model.id for model in client.models.list()] == ["tiny", "anna", "bert", "carl"]
    with pytest.raises(openai.NotFoundError, match="known: tiny, anna"):
        client.models.retrieve("who/is this")


def until_idle(world: World) -> None:
    end = time.monotonic() + 20
    while not world.idle():
        assert time.monotonic() < end
        time.sleep(0.01)


ENDLESS = {"model": "carl", "messages": ASK, "max_tokens": 1900, "ignore_eos": True}


def test_who_hangs_up_frees_everything(http: httpx.Client, url: str, world: World) -> None:
    until_idle(world)
    before = world.replica.engine.counters.completion_tokens
    with http.stream("POST", "/v1/chat/completions", json=ENDLESS | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert not world.idle()
    until_idle(world)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=ENDLESS | {"n": 3}, timeout=0.3)
    until_idle(world)
    assert world.replica.engine.counters.completion_tokens - before < 4 * 1900


def test_a_request_ends_when_its_time_is_over(server_of: Callable[..., str], world: World) -> None:
    url = server_of(Serve(request_timeout=0.3))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="carl", messages=ASK, max_tokens=1900, extra_body={"ignore_eos": True})  # type: ignore[arg-type]
    assert caught.value.status_code == 408
    until_idle(world)
    with (
        httpx.Client(base_url=url) as http,
        httpx_sse.connect_sse(http, "POST", "/v1/chat/completions", json=ENDLESS | {"stream": True}) as source,
    ):
        last = list(source.iter_sse())[-1].json()
    assert last["error"]["code"] == "R836"
    until_idle(world)


def test_too_much_is_waiting(server_of: Callable[..., str], world: World, tiny_model_folder: str) -> None:
    async def made() -> Replica:
        settings = EngineSettings(max_num_seqs=1, max_num_batched_tokens=16, max_queued_tokens=1)
        return Replica(sharpened(tiny_model_folder), world.tokenizer, "tiny", settings=settings)

    replica = world.loop.run(made())
    url = server_of(Serve(max_queued_tokens=1), backend=replica)
    body = ENDLESS | {"model": "tiny", "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as running:
        lines = running.iter_lines()  # closed, and with it the stream, when nobody holds it
        next(lines)
        short = body | {"max_tokens": 1}
        waiting = threading.Thread(target=lambda: httpx.post(f"{url}/v1/chat/completions", json=short, timeout=60))
        waiting.start()
        end = time.monotonic() + 20
        while replica.engine.has_room:
            assert time.monotonic() < end
            time.sleep(0.01)
        refused = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"] == {
            "message": refused.json()["error"]["message"], "type": "rate_limit_error", "param": None,
            "code": "server_overloaded",
        }  # fmt: skip
        assert httpx.get(f"{url}/ready").status_code == 503 and httpx.get(f"{url}/health").status_code == 200
    waiting.join()
    replica.close()


def test_idle_streams_get_comments(server_of: Callable[..., str], world: World) -> None:
    url = server_of(keep_alive=0.0001)
    body = ENDLESS | {"stream": True, "max_tokens": 20}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        lines = list(response.iter_lines())
    assert ": keep-alive" in lines and lines[-2:] == ["data: [DONE]", ""]


def test_the_async_client_and_never_another_requests_text(url: str, http: httpx.Client) -> None:
    generator = random.Random(3)
    words = [word for line in CORPUS for word in line.split()]
    asked = [
        {
            "model": generator.choice(["tiny", "anna", "bert", "carl"]),
            "messages": [{"role": "user", "content": " ".join(generator.choices(words, k=generator.randint(1, 12)))}],
            "max_tokens": generator.randint(1, 16),
            "temperature": 0,
        }
        for _ in range(24)
    ]
    alone = [chat(http, **fields)["choices"][0]["message"]["content"] for fields in asked]

    async def main() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        async def ask(fields: dict[str, Any], stream: bool) -> str:
            if not stream:
                return (await client.chat.completions.create(**fields)).choices[0].message.content or ""
            chunks = await client.chat.completions.create(**fields, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        return await asyncio.gather(*(ask(fields, i % 2 == 0) for i, fields in enumerate(asked)))

    assert asyncio.run(main()) == alone
