"""Responses, as /openapi.json describes them. Bodies are built as plain data; the tests hold them to these shapes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Problem(BaseModel):
    message: str
    """Begins with the id of docs/errors."""
    type: str
    param: str | None
    """The field that it is about."""
    code: str | None


class Error(BaseModel):
    error: Problem


class CachedTokens(BaseModel):
    cached_tokens: int


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[Call] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: UsageBody


class TextLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: UsageBody


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


_SAID: dict[int | str, str] = {
    400: "The request cannot be answered as it is",
    401: "No key, or an unknown one",
    403: "The key does not allow this",
    404: "Unknown name",
    408: "No answer within `request_timeout`",
    413: "The body is too large",
    429: "Over a limit; see the header retry-after",
    "4XX": "Another error in the request",
    500: "The engine failed",
    503: "Not ready, or stopping",
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": said} for status, said in _SAID.items()
}
"""What any route may answer besides."""


def streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A body, or with `stream: true` server-sent events."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}


class Status(BaseModel):
    status: str


class Distribution(BaseModel):
    mean: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float


class Summary(BaseModel):
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    seconds: Distribution | None
    first_token_seconds: Distribution | None
    tokens_per_second: Distribution | None
    memory_bytes: Distribution | None
    gpu_memory_bytes: Distribution | None
    gpu_utilization: Distribution | None


class ModelInfo(BaseModel):
    model: str
    base: str
    architecture: str
    dtype: str
    quantization: str | None
    parameters: int
    """Of the base, unpacked from quantisation."""
    adapter_parameters: int | None
    total_parameters: int
    vocabulary: int
    max_model_len: int
    content: str | None
    version: int | None
    adapters: list[str]


class Generated(BaseModel):
    generated_texts: list[str]
    input_tokens: int
    output_tokens: int
    """Of all texts together."""
    generation_time: float
    """Seconds."""
