"""Requests as OpenAI's clients send them, with the fields that vLLM adds."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from rayft.inference.request import TOP_LOGPROBS

Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
IdText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]

_REFUSED = {
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "audio": "answers are text",
    "suffix": "text is only continued",
    "prompt_logprobs": "only the answer's tokens have logprobs",
    "allowed_token_ids": "use `structured_outputs`",
    "bad_words": "use `logit_bias`",
    "chat_template": "answers use the template of the adapter or of the base",
    "cache_salt": "prefixes are never shared between API keys",
    "use_beam_search": "tokens are drawn or chosen greedily",
    "documents": "put them into a message",
}
"""Fields that would change the answer and that this server does not have: said, not ignored."""


class Body(BaseModel):
    """Part of a request. Wrong types are refused (`true` is no number); unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    """Send one more chunk with the usage at the end."""


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type json_schema, and only then")
        return self


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = Field(None, min_length=1)
    grammar: Text | None = None
    """A Lark grammar, in llguidance's dialect."""
    json_object: bool | None = None


class Generation(Body):
    """What chat and completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    """The base, an adapter's name, `name@VERSION`, or a content hash."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=32)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """1 by default, as in OpenAI's API; 0 = always the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[IdText, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Token id -> number added to its logit."""
    max_tokens: Count | None = None
    user: str | None = None
    """Requests of one user stay with one version of an alias that has several."""
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 or -1 = all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """Smaller goes first. Below 0 needs the admin key where there are keys."""
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    """This and the next three: older names of `structured_outputs`."""
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    guided_grammar: Text | None = None
    lora_strength: Annotated[float, Field(ge=-16, le=16)] | None = None
    """Multiplies the adapter's update: 0 = the base's numbers, 1 = as trained. rayft's own."""

    @model_validator(mode="after")
    def _offered(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in (None, False, [], {}):
                raise ValueError(f"{name} is not offered; {_REFUSED[name]}")
        if self.min_tokens and self.limit and self.min_tokens > self.limit:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above the most tokens asked for ({self.limit})")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given with stream: true, and only then")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None = no limit was asked for."""
        return self.max_tokens

    def ignored(self) -> list[str]:
        """Unknown fields, with the known one that each may have meant. Only names fit for a header are told."""
        told = []
        for name in self.model_extra or {}:
            if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII) or name in _REFUSED:
                continue
            near = difflib.get_close_matches(name, list(type(self).model_fields), n=1, cutoff=0.8)
            told.append(f"{name} (meant {near[0]}?)" if near else name)
        return told[:20]


class FunctionCall(Body):
    name: Text
    arguments: str
    """JSON text."""


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} has content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only messages of role assistant have tool_calls")
        return self


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`. By default an answer may fill the context."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    """false: only the first call of an answer is reported."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, such as `enable_thinking`."""

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of role assistant")
        return self


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    """Texts or token ids; each of several prompts gets `n` answers."""
    echo: bool | None = None
    """Let the answer begin with the prompt, which is a text then."""
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    """How many of the most likely tokens are reported per token, besides the one that was chosen."""
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not offered; ask for n answers and choose")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not offered: only the answer's tokens have logprobs")
        if self.echo and not isinstance(self.prompts[0], str):
            raise ValueError("echo needs prompts that are texts")
        if len(self.prompts) * (self.n or 1) > 2048:
            raise ValueError("at most 2048 answers per request")
        return self
