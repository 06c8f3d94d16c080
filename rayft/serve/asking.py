"""Requests as jobs: prompts, sampling and grammars in the engines' own words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayft.inference.grammar import Grammar
from rayft.inference.request import SamplingParams
from rayft.serve.errors import ApiError
from rayft.serve.job import Conversation, Job
from rayft.serve.names import Served
from rayft.serve.protocol import ChatRequest, CompletionRequest, Generation, Message, NamedChoice

COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""

_OWN = {"messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
        "continue_final_message", "padding", "truncation", "max_length"}  # fmt: skip
"""Arguments of `apply_chat_template` that are no variables of a template; nor is anything that begins with return_."""


def chat_jobs(body: ChatRequest, id: str, served: Served, tenant: str) -> list[Job]:
    """The one job of a chat. Raises ApiError R830, UsageError R811."""
    return [_job(body, f"{id}-0", _conversation(body), served, tenant, body.logprobs, body.top_logprobs)]


def completion_jobs(body: CompletionRequest, id: str, served: Served, tenant: str) -> list[Job]:
    """One job per prompt, in order. Raises ApiError R830, UsageError R811."""
    asked = body.logprobs is not None
    return [
        _job(
            body,
            f"{id}-{i}",
            prompt if isinstance(prompt, str) else tuple(prompt),
            served,
            tenant,
            asked,
            body.logprobs,
        )
        for i, prompt in enumerate(body.prompts)
    ]


def _job(
    body: Generation,
    id: str,
    prompt: Conversation | str | tuple[int, ...],
    served: Served,
    tenant: str,
    logprobs: bool | None,
    top: int | None,
) -> Job:
    open_end = body.limit is None and isinstance(body, ChatRequest)
    return Job(
        id=id,
        prompt=prompt,
        sampling=_sampling(body, logprobs, top),
        adapter=served.content,
        strength=_given(body.lora_strength, served.strength) if served.content is not None else 1.0,
        open_end=open_end,
        n=body.n or 1,
        stream=bool(body.stream),
        grammar=_grammar(body),
        tenant=tenant,
        priority=body.priority or 0,
    )


def _sampling(body: Generation, logprobs: bool | None, top: int | None) -> SamplingParams:
    least = body.min_tokens or 0
    default = max(least, COMPLETION_TOKENS)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingParams(
        max_new_tokens=_given(body.limit, default),
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(id): bias for id, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=least,
        logprobs=bool(logprobs),
        top_logprobs=top or 0,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _grammar(body: Generation) -> Grammar | None:
    """The one form that the answer must have. Raises ApiError R830 when several are asked for, or a remote $ref."""
    found: list[tuple[str, Grammar]] = []
    if (form := body.response_format) is not None and form.type == "json_object":
        found.append(("response_format", Grammar("json_object")))
    if form is not None and form.json_schema is not None:
        found.append(("response_format", Grammar("json_schema", _schema(form.json_schema.schema_, "response_format"))))
    outputs = body.structured_outputs
    for where, schema, regex, choice, lark in (
        ("guided", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar),
        (
            "structured_outputs",
            *((outputs.json_, outputs.regex, outputs.choice, outputs.grammar) if outputs else (None, None, None, None)),
        ),
    ):
        if schema is not None:
            found.append((where, Grammar("json_schema", _schema(schema, where))))
        if regex is not None:
            found.append((where, Grammar("regex", regex)))
        if choice is not None:
            found.append((where, Grammar("choice", json.dumps(choice))))
        if lark is not None:
            found.append((where, Grammar("lark", lark)))
    if outputs is not None and outputs.json_object:
        found.append(("structured_outputs", Grammar("json_object")))
    if len(found) > 1:
        raise ApiError("R830", "an answer has one form: give one of response_format, structured_outputs, guided_*",
                       param=found[1][0])  # fmt: skip
    return found[0][1] if found else None


def _schema(schema: Mapping[str, Any] | str, where: str) -> str:
    """JSON of a schema, keys in their order."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ApiError("R830", f"the schema is not JSON: {error}", param=where) from error
    for part in _parts(schema):
        reference = part.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ApiError(
                "R830", f"$ref {reference[:80]!r} leads out of the schema", "put it under $defs", param=where
            )
    return json.dumps(schema)


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            yield part
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)


def _conversation(body: ChatRequest) -> Conversation:
    variables = dict(body.chat_template_kwargs or {})
    if taken := [name for name in variables if name in _OWN or name.startswith("return_")]:
        raise ApiError("R830", f"chat_template_kwargs: {taken[0]} is no variable of a template",
                       param="chat_template_kwargs")  # fmt: skip
    choice = body.tool_choice
    goes_on = bool(body.continue_final_message)
    return Conversation(
        messages=tuple(_message(message, i) for i, message in enumerate(body.messages)),
        tools=tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
        tool_choice=f"function:{choice.function.name}" if isinstance(choice, NamedChoice) else choice or "auto",
        add_generation_prompt=_given(body.add_generation_prompt, not goes_on),
        continue_final_message=goes_on,
        template_kwargs=variables,
    )


def _message(message: Message, number: int) -> dict[str, Any]:
    """As chat templates expect it: one text, `system` for `developer`, arguments of calls as objects."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    plain |= message.model_dump(include={"name", "tool_call_id", "reasoning_content"}, exclude_none=True)
    if message.tool_calls:
        plain["tool_calls"] = []
        for call in message.tool_calls:
            try:
                arguments = json.loads(call.function.arguments or "{}")
            except (ValueError, RecursionError) as error:
                place = f"messages[{number}].tool_calls"
                raise ApiError("R830", f"{place}: arguments are not JSON: {error}", param=place) from error
            function = {"name": call.function.name, "arguments": arguments}
            plain["tool_calls"].append({"id": call.id, "type": "function", "function": function})
    return plain
