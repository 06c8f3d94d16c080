"""What the HTTP side asks of a replica, and what comes back: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayft.inference.grammar import Grammar
from rayft.inference.request import SamplingParams, Usage

Finish = Literal["stop", "length", "tool_calls", "cancelled", "error"]
ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Content:
    """One adapter's content: what a name stood for when a request came."""

    hash: str
    """sha256 of tensors and config (`AdapterState.content_hash`)."""
    path: str
    """A stock adapter folder that every replica can read, where its tokenizer and chat template lie too."""


@dataclass(frozen=True)
class Conversation:
    """Messages, to be rendered with the chat template of the adapter, or of the base where it brings none."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI's: `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    tool_choice: ToolChoice | str = "auto"
    """Or the name of the one function that is to be called, as `function:NAME`."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One request, with ``n`` answers."""

    id: str
    prompt: Conversation | str | tuple[int, ...]
    """Text and ids are continued as they are."""
    sampling: SamplingParams
    adapter: Content | None = None
    """None = the bare base."""
    strength: float = 1.0
    open_end: bool = False
    """The answer may be as long as the context allows, whatever `sampling.max_new_tokens` says."""
    n: int = 1
    stream: bool = True
    """Whether pieces are wanted as they come; else all of them may come in one item at the end, which costs less."""
    grammar: Grammar | None = None
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True)
class Token:
    """One token of an answer, with what `logprobs` asked for."""

    id: int
    text: str
    """As the tokenizer writes this token alone; bytes that are no character are the replacement character."""
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    """(id, text, logprob) of the most likely ones, best first."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote."""

    id: str
    name: str
    arguments: str
    """JSON text."""


@dataclass(frozen=True)
class Piece:
    """What came to one answer since the piece before."""

    index: int
    """Of the answer, 0 to n - 1."""
    text: str = ""
    tokens: tuple[Token, ...] = ()
    """Those that came since. `text` leaves out stop texts, special tokens and tool calls; so it may be shorter."""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: Finish | None = None
    """Set on the last piece of an answer only, and so are the next two."""
    usage: Usage | None = None
    """Of this answer; the prompt's tokens are counted in each answer of a job and billed once."""
    error: str | None = None
