"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from rayft.inference.request import Usage
from rayft.serve.errors import shape_of
from rayft.serve.flow import Flow
from rayft.serve.job import Piece, Token, ToolCall

Kind = Literal["chat", "text"]


class About(Protocol):
    """Which request it is; the fingerprint is known when it has begun."""

    id: str
    created: int
    fingerprint: str | None


@dataclass(frozen=True)
class Frame:
    """What all bodies of one answer begin with, and what the request wants to see."""

    kind: Kind
    about: About
    model: str
    """As the request named it."""
    logprobs: bool = False
    one_call: bool = False
    """Only the first tool call of an answer counts."""
    echo: tuple[str, ...] = ()
    """Text before each answer."""

    def head(self, chunk: bool) -> dict[str, Any]:
        name = "text_completion" if self.kind == "text" else "chat.completion" + ".chunk" * chunk
        head = {"id": self.about.id, "object": name, "created": self.about.created, "model": self.model}
        return head | {"system_fingerprint": self.about.fingerprint}


@dataclass
class Answer:
    """One answer so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.tool_calls += piece.tool_calls
        self.finish_reason = piece.finish_reason


async def whole(flow: Flow) -> list[Answer]:
    """All answers of a flow that has begun. Raises as `Flow.take` does."""
    answers = [Answer() for _ in range(flow.answers)]
    while (pieces := await flow.take()) is not None:
        for piece in pieces:
            answers[piece.index].add(piece)
    return answers


def total(flow: Flow) -> Usage:
    """What the request is billed: the prompt of a job once, however many answers it has. It waited as long as that
    of its answers which waited longest."""
    prompt = cached = 0
    first = 0
    for job in flow.jobs:
        of_job = [flow.usage[i] for i in range(first, first + job.n) if i in flow.usage]
        prompt += max((usage.prompt_tokens for usage in of_job), default=0)
        cached += min((usage.cached_tokens for usage in of_job), default=0)
        first += job.n
    queued = [usage.queued for usage in flow.usage.values() if usage.queued is not None]
    completion = sum(usage.completion_tokens for usage in flow.usage.values())
    return Usage(prompt, completion, cached, max(queued, default=None))


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def body(frame: Frame, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
    """The body of a request that is answered in one piece."""
    choices = [_choice(frame, i, answer) for i, answer in enumerate(answers)]
    return frame.head(chunk=False) | {"choices": choices, "usage": usage_body(usage)}


def _choice(frame: Frame, index: int, answer: Answer) -> dict[str, Any]:
    calls = answer.tool_calls[:1] if frame.one_call else answer.tool_calls
    choice: dict[str, Any] = {"index": index}
    if frame.kind == "text":
        choice["text"] = (frame.echo[index] if frame.echo else "") + answer.text
    else:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else "")}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        choice["message"] = message
    choice["logprobs"] = _logprobs(frame, answer.tokens, 0)
    choice["finish_reason"] = answer.finish_reason
    return choice


async def chunks(frame: Frame, flow: Flow, include_usage: bool, keep_alive: float) -> AsyncIterator[bytes]:
    """Server-sent events of a flow that has begun. An error after the first event is an event too.

    keep_alive: seconds without an event after which a comment is sent, so that nobody on the way hangs up.
    """
    makers = [_Chunks(frame, i, include_usage) for i in range(flow.answers)]
    try:
        for maker in makers:
            for chunk in maker.first():
                yield event(chunk)
        while (pieces := await flow.take(keep_alive)) is not None:
            if not pieces:
                yield b": keep-alive\n\n"
            for piece in pieces:
                for chunk in makers[piece.index].of(piece):
                    yield event(chunk)
    except Exception as error:
        yield event(shape_of(error))
        raise
    if include_usage:
        yield event(frame.head(chunk=True) | {"choices": [], "usage": usage_body(total(flow))})
    yield b"data: [DONE]\n\n"


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event. All in ASCII: some clients take U+2028 and its like for ends of lines."""
    return b"data: " + json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class _Chunks:
    """The chunks of one answer."""

    def __init__(self, frame: Frame, index: int, with_usage: bool) -> None:
        self._frame, self._index = frame, index
        self._head = frame.head(chunk=True)
        self._usage = {"usage": None} if with_usage else {}
        self._calls = self._written = 0
        """Tool calls, and characters of tokens, that were sent."""

    def first(self) -> Iterable[dict[str, Any]]:
        if self._frame.kind == "chat":
            yield self._chunk({"delta": {"role": "assistant", "content": ""}})
        elif self._frame.echo:
            yield self._chunk({"text": self._frame.echo[self._index]})

    def of(self, piece: Piece) -> Iterable[dict[str, Any]]:
        frame = self._frame
        if self._frame.one_call and piece.tool_calls:
            piece = replace(piece, tool_calls=piece.tool_calls[: 1 - self._calls])
        told = {"logprobs": _logprobs(frame, piece.tokens, self._written)} if piece.tokens else {}
        self._written += sum(len(token.text) for token in piece.tokens)
        if frame.kind == "text":
            if piece.text or piece.finish_reason or any(told.values()):
                yield self._chunk({"text": piece.text, **told}, piece.finish_reason)
            return
        if piece.text or any(told.values()):
            yield self._chunk({"delta": {"content": piece.text}, **told})
        if piece.tool_calls:
            calls = [{"index": self._calls + i} | _call(call) for i, call in enumerate(piece.tool_calls)]
            self._calls += len(calls)
            yield self._chunk({"delta": {"tool_calls": calls}})
        if piece.finish_reason:
            yield self._chunk({"delta": {}}, piece.finish_reason)

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": self._index, "logprobs": None} | choice | {"finish_reason": finish_reason}
        return self._head | {"choices": [choice]} | self._usage


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(frame: Frame, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
    """offset: characters of the tokens before these."""
    if not frame.logprobs:
        return None
    if frame.kind == "chat":
        content = [
            _entry(token.text, token.logprob)
            | {"top_logprobs": [_entry(text, logprob) for _, text, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "text_offset": offsets,
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [_table(token) for token in tokens],
    }


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def _table(token: Token) -> dict[str, float | None]:
    """Text -> logprob of the most likely tokens and the one that was chosen; of two with one text the likelier."""
    table: dict[str, float | None] = {}
    for _, text, logprob in (*token.top, (token.id, token.text, token.logprob)):
        table.setdefault(text, logprob)
    return table
