"""Tools and forms of answers over HTTP, with the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "order",
        "description": "Order pizzas",
        "parameters": {
            "type": "object",
            "properties": {"count": {"enum": [1, 2]}, "size": {"enum": ["small", "large"]}},
            "required": ["count", "size"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "cancel", "parameters": {"type": "object", "properties": {}}}}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Please order two pizzas"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def check(arguments: str) -> None:
    called = json.loads(arguments)
    assert set(called) == {"count", "size"} and called["count"] in (1, 2) and called["size"] in ("small", "large")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "order"}}])
def test_a_call_whole_and_streamed(http: httpx.Client, client: openai.OpenAI, choice: Any) -> None:
    tools = [TOOL] if choice == "required" else [OTHER, TOOL]
    fields: dict[str, Any] = {"model": "anna", "messages": ASK, "tools": tools, "tool_choice": choice}
    fields |= {"max_tokens": 120, "temperature": 0, "parallel_tool_calls": False}
    body = http.post(CHAT, json=fields).json()
    answer = ChatCompletion.model_validate(body).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert answer.message.tool_calls is not None and len(answer.message.tool_calls) == 1
    call = answer.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "order" and call.id
    check(call.function.arguments)

    chunks = [
        ChatCompletionChunk.model_validate(c.to_dict()) for c in client.chat.completions.create(**fields, stream=True)
    ]
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].id and parts[0].type == "function" and parts[0].function is not None
    assert {part.index for part in parts} == {0}
    check("".join(part.function.arguments or "" for part in parts if part.function))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    told = [*ASK, body["choices"][0]["message"], {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    after = http.post(CHAT, json={"model": "anna", "messages": told, "tools": tools, "max_tokens": 4})
    assert after.status_code == 200, after.text


def test_no_tools_are_called_where_none_are_wanted(http: httpx.Client) -> None:
    fields = {"model": "anna", "messages": ASK, "tools": [TOOL], "tool_choice": "none", "max_tokens": 8}
    message = http.post(CHAT, json=fields).json()["choices"][0]["message"]
    assert "tool_calls" not in message and message["content"]


class Size(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    large: bool
    count: int = pydantic.Field(ge=1, le=3)


def test_json_of_a_schema(http: httpx.Client, client: openai.OpenAI) -> None:
    schema = Size.model_json_schema()
    form = {"type": "json_schema", "json_schema": {"name": "size", "schema": schema}}
    forms: list[dict[str, Any]] = [
        {"response_format": form}, {"guided_json": schema}, {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema}},
    ]  # fmt: skip
    for fields in forms:
        body = {"model": "bert", "messages": ASK, "max_tokens": 400, "seed": 1, "frequency_penalty": 2} | fields
        text = http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
        Size.model_validate_json(text)
    parsed = client.chat.completions.parse(
        model="bert",
        messages=ASK,  # type: ignore[arg-type]
        response_format=Size,
        max_tokens=400,
        seed=1,
        frequency_penalty=2,
    )
    assert isinstance(parsed.choices[0].message.parsed, Size)


def test_choices_patterns_and_grammars(http: httpx.Client) -> None:
    forms: list[tuple[dict[str, Any], str]] = [
        ({"guided_choice": ["Paris", "Rome"]}, "Paris|Rome"),
        ({"structured_outputs": {"choice": ["Paris", "Rome"]}}, "Paris|Rome"),
        ({"guided_regex": "[0-9]{3}-[ab]"}, "[0-9]{3}-[ab]"),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "yes|no"),
    ]
    for fields, pattern in forms:
        body = {"model": "bert", "prompt": "Sure", "max_tokens": 40, "temperature": 1, "n": 2} | fields
        for choice in http.post("/v1/completions", json=body).json()["choices"]:
            assert re.fullmatch(pattern, choice["text"]) and choice["finish_reason"] == "stop"
    body = {"model": "bert", "messages": ASK, "max_tokens": 200, "response_format": {"type": "json_object"}}
    choice = http.post(CHAT, json=body | {"temperature": 0}).json()["choices"][0]
    assert choice["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "("},
        {"guided_json": "{"},
        {"guided_json": {"type": "nonsense"}},
        {"guided_json": {"type": "object", "properties": {"a": {"$ref": "https://evil.example/s.json"}}}},
        {"guided_json": {"$ref": "file:///etc/passwd"}},
        {"guided_grammar": "start: ("},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {"tools": [{"type": "function", "function": {"name": "no good name"}}]},
        {
            "tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "nonsense"}}}],
            "tool_choice": "required",
        },
        {"tool_choice": {"type": "function", "function": {"name": "order"}}},
    ],
)
def test_bad_forms_are_the_clients_fault(http: httpx.Client, fields: dict[str, Any]) -> None:
    response = http.post(CHAT, json={"model": "tiny", "messages": ASK, "max_tokens": 8} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
