"""Whatever comes in: no status of 5xx, errors always in OpenAI's shape, streams always framed."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import httpx_sse
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk
from schemathesis.checks import CHECKS, load_all_checks

from rayft.inference.request import Usage
from rayft.runs.registry import Registry
from rayft.serve import keys
from rayft.serve.assemble import assemble
from rayft.serve.backend import ModelCard
from rayft.serve.job import Job, Piece, Token, ToolCall
from tests.serve.api.conftest import World, planned

load_all_checks()
QUIET = settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def guarded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, headers) of a server with keys and a registry."""
    folder = tmp_path_factory.mktemp("fuzz")
    Registry(folder / "registry").register("live", world.adapters["anna"].path, stage="production")
    key = keys.add(folder / "keys.json", "boss", admin=True)
    plan = planned(folder, api_keys=str(folder / "keys.json"), request_timeout=20.0)
    with world.listening(assemble(plan, world.replica)) as url:
        yield url, {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def api(guarded: tuple[str, dict[str, str]]) -> Any:
    url, headers = guarded
    config = schemathesis.Config.from_dict({"headers": headers})
    return schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers, config=config)


EXCLUDED = [
    "positive_data_acceptance",  # what fields must have in common is not in the schema; other tests say what is refused
    "ignored_auth",  # it replaces the key that is sent with every request, and finds it accepted; the next test asks
    "allow_header_conformance",  # `/v1/adapters/a/b/promote` is also the adapter `a/b/promote`, which can be deleted
]

fuzz = schemathesis.pytest.from_fixture("api")


@pytest.mark.long
@fuzz.parametrize()
@settings(QUIET, max_examples=8)
def test_every_route(case: Any) -> None:
    if isinstance(case.body, dict):
        _shortened(case.body)
    response = case.call()
    case.validate_response(response, excluded_checks=CHECKS.get_by_names(EXCLUDED))
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"].startswith("R")


def test_every_route_asks_for_a_key(guarded: tuple[str, dict[str, str]]) -> None:
    url, _ = guarded
    asked = 0
    for path, methods in httpx.get(f"{url}/openapi.json", headers=guarded[1]).json()["paths"].items():
        for method, operation in methods.items():
            if operation.get("security"):
                response = httpx.request(method, url + path.replace("{", "").replace("}", ""))
                assert response.status_code == 401, path
                asked += 1
            else:
                assert path in ("/health", "/ready")
    assert asked > 15


def _shortened(body: dict[str, Any]) -> None:
    """Answers that a test can wait for, and more often by a model that is there."""
    chosen = random.Random(json.dumps(body, default=str))
    if isinstance(body.get("model"), str) and chosen.random() < 0.7:
        body["model"] = chosen.choice(["tiny", "live"])
    if body.get("stream") is True:
        body["stream"] = False
        body.pop("stream_options", None)
    for name in ("max_tokens", "max_completion_tokens", "max_length"):
        if type(body.get(name)) is int and body[name] > 8:
            body[name] = 8
    if "model" in body:
        body.setdefault("max_tokens", 4)
    if type(body.get("n")) is int and body["n"] > 4:
        body["n"] = 4


class Scripted:
    """A backend that says what a test wants to hear, in the portions it wants."""

    def __init__(self) -> None:
        self.items: Sequence[Any] = ()

    async def card(self) -> ModelCard:
        return ModelCard("tiny", None, "", "", None, 1, 1, 10_000, 0)

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


scripted = Scripted()


@pytest.fixture(scope="module")
def script(world: World) -> Iterator[httpx.Client]:
    with world.listening(world.app(backend=scripted)) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http


# Ends of lines of all kinds, quotes, what looks like events, characters beyond the 16 bits.
texts = st.lists(
    st.one_of(
        st.text(max_size=20), st.sampled_from(["\n\n", "\r", "data: [DONE]\n\n", "\u2028", "\x85", "\x00", "😀"])
    ),
    max_size=4,
).map("".join)


@st.composite
def answers(draw: Any) -> tuple[list[list[Piece]], list[str], list[list[str]]]:
    """Items as a backend may give them, then the texts and the names of the calls of each answer."""
    count = draw(st.integers(1, 3))
    said, called = [""] * count, [[] for _ in range(count)]  # type: ignore[var-annotated]
    pieces: list[Piece] = []
    for index in draw(st.lists(st.integers(0, count - 1), max_size=8)):
        text = draw(texts)
        calls = tuple(
            ToolCall(f"c{i}", draw(st.text(min_size=1, max_size=5)), "{}") for i in range(draw(st.integers(0, 2)))
        )
        said[index] += text
        called[index] += [call.name for call in calls]
        pieces.append(Piece(index, text, (Token(1, text, -0.5, ((1, text, -0.5),)),), calls))
    for index in range(count):
        text = draw(texts)
        said[index] += text
        pieces.append(Piece(index, text, finish_reason="stop", usage=Usage(3, 2, 0)))
    items, rest = [], pieces
    while rest:
        size = draw(st.integers(1, len(rest)))
        items.append(rest[:size])
        rest = rest[size:]
    return items, said, called


@given(script_of=answers(), with_usage=st.booleans())
@QUIET
def test_streams_are_framed_whatever_the_text(script: httpx.Client, script_of: Any, with_usage: bool) -> None:
    scripted.items, said, called = script_of
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": len(said), "logprobs": True}
    whole = script.post("/v1/chat/completions", json=body).json()
    assert [choice["message"]["content"] or "" for choice in whole["choices"]] == said
    body |= {"stream": True, "stream_options": {"include_usage": with_usage}}
    with httpx_sse.connect_sse(script, "POST", "/v1/chat/completions", json=body) as source:
        assert source.response.headers["content-type"].startswith("text/event-stream")
        data = [event.data for event in source.iter_sse()]
    assert data.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(item) for item in data]
    if with_usage:
        usage = chunks.pop().usage
        assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (3, 2 * len(said))
    for index, text in enumerate(said):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and [c.finish_reason for c in own][-1] == "stop"
        assert all(choice.finish_reason is None for choice in own[:-1])
        assert "".join(choice.delta.content or "" for choice in own) == text
        calls = [call for choice in own for call in choice.delta.tool_calls or []]
        assert [call.function.name for call in calls if call.function] == called[index]
        assert [call.index for call in calls] == list(range(len(calls)))


@given(
    before=st.lists(st.integers(0, 2), max_size=4), end=st.sampled_from(["stop", "error", "cancelled", "none", "raise"])
)
@QUIET
def test_an_engine_that_breaks_off_is_an_error_and_never_half_an_answer(
    script: httpx.Client, before: list[int], end: str
) -> None:
    items: list[Any] = [[Piece(0, "x")] * count for count in before]
    if end == "raise":
        items.append(RuntimeError("secret"))
    elif end != "none":
        reason: Any = end
        items.append([Piece(0, finish_reason=reason, usage=Usage(1, 1, 0), error="RuntimeError: secret")])
    scripted.items = items
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    whole = script.post("/v1/chat/completions", json=body)
    streamed = script.post("/v1/chat/completions", json=body | {"stream": True}).text
    assert whole.status_code == {"stop": 200, "cancelled": 503}.get(end, 500)
    assert "secret" not in whole.text + streamed
    assert streamed.endswith("data: [DONE]\n\n") == (end == "stop")
    last = json.loads(streamed.strip().split("\n\n")[-1].removeprefix("data: ")) if end != "stop" else {}
    assert ("error" in last) == (end != "stop")


def test_bytes_at_random(guarded: tuple[str, dict[str, str]]) -> None:
    generator = random.Random(7)
    url, headers = guarded
    with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
        for _ in range(100):
            data = generator.randbytes(generator.randint(0, 60))
            path = generator.choice(
                ["/v1/chat/completions", "/v1/completions", "/generate", "/generate_batch", "/v1/adapters"]
            )
            response = http.post(path, content=data, headers={"content-type": "application/json"})
            assert response.status_code == 400 and set(response.json()) == {"error"}
