"""What is refused, and how it is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

ASK = [{"role": "user", "content": "Please order two pizzas"}]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"model": 7}, "model", "string"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"max_tokens": 10**400}, "max_tokens", "less than"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 9}, "temperature", "2"),
        ({"n": 0}, "n", "greater"),
        ({"messages": []}, "messages", "1 item"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text"),
        ({"stop": [""]}, "stop", "character"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"top_logprobs": 3}, None, "logprobs: true"),
        ({"functions": [{}]}, None, "use `tools`"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided", "one form"),
        ({"guided_json": {"$ref": "http://evil/x"}}, "guided", "leads out"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "no variable"),
        ({"chat_template": "{{ x }}"}, None, "not offered"),
        ({"max_tokens": 5000}, None, "R812"),
        ({"logit_bias": {"99999": 1}}, None, "R811"),
    ],
)
def test_bad_input_gets_one_clear_message(
    http: httpx.Client, fields: dict[str, Any], param: str | None, said: str
) -> None:
    response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 4} | fields)
    error = response.json()["error"]
    assert response.status_code == 400 and said in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[1]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"model": "\\ud800"}', b"[" * 100_000,
     b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_no_json(http: httpx.Client, data: bytes) -> None:
    response = http.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_not_there(http: httpx.Client, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=ASK)  # type: ignore[arg-type]
    assert caught.value.param == "model" and caught.value.code == "model_not_found"
    assert "known: tiny, anna, bert, carl" in caught.value.message
    assert http.get("/nowhere").json()["error"]["code"] == "R840"
    wrong = http.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "R841" and wrong.headers["allow"] == "POST"
    text = http.post("/v1/chat/completions", content="{}", headers={"content-type": "text/plain"})
    assert text.status_code == 400 and "application/json" in text.json()["error"]["message"]


def test_unknown_fields_are_named_and_ignored(http: httpx.Client) -> None:
    response = http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": ASK, "max_tokens": 1, "temprature": 0.5, "metadata": {"a": "b"}, "é\n": 1},
    )
    assert response.headers["x-rayft-ignored"] == "temprature (meant temperature?), metadata"


def test_a_body_that_is_too_large(server_of: Callable[..., str]) -> None:
    url = server_of(max_body=2000)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 3000}]}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 413

    def drip() -> Any:
        for _ in range(30):
            yield b"x" * 100

    assert httpx.post(f"{url}/v1/chat/completions", content=drip()).json()["error"]["code"] == "R835"


def test_refusals_of_a_stream_have_their_status(http: httpx.Client) -> None:
    for fields, status in (({"max_tokens": 5000}, 400), ({"model": "nobody"}, 404)):
        body = {"model": "tiny", "messages": ASK, "stream": True} | fields
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == status and response.headers["content-type"] == "application/json"
