"""Messages of OpenAI's and ShareGPT's conventions -> the form that chat templates read."""

from __future__ import annotations

import json
from typing import Any

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Role in the data -> role in the chat template."""


class BadRow(Exception):
    """A row does not fit its format; the message says why. The caller adds where it stands."""


def as_messages(value: Any, column: str) -> list[dict[str, Any]]:
    """A conversation as a list of messages: `role`, `content` (a string) and what else the message carries.

    Reads `role`/`content` and `from`/`value`; contents in parts are joined; arguments of tool calls that are JSON text
    become objects, since templates print them as JSON themselves.
    """
    messages = as_list(value)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{column} must be a list of messages, not {_shape(value)}")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(messages)]


def as_tools(value: Any) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of JSON schemas, or such a list as JSON text; None when there are none."""
    tools = as_list(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools must be a list of JSON schemas, not {_shape(value)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def as_list(value: Any) -> Any:
    """A list that is written as JSON text (CSV and Parquet files often do) as a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def text(value: Any, column: str) -> str:
    """A text column; numbers are written out."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise BadRow(f"{column} must be text, not {_shape(value)}")


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{place} must be an object with role and content, not {_shape(message)}")
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "from", "value")}
    said = message.get("role", message.get("from"))
    if said not in ROLES:
        raise BadRow(f"{place} has role {said!r}; known: {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if said == "function_call":
        rest["tool_calls"], content = _json(content, place), None
    calls = rest.pop("tool_calls", None)
    if calls:
        rest["tool_calls"] = [_tool_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]
    weight = rest.get("weight")
    if weight is not None and not (isinstance(weight, int | float) and 0 <= weight <= 1):
        raise BadRow(f"{place}: weight must be a number from 0 to 1, not {weight!r}")
    if content is None and not calls and ROLES[said] != "assistant":
        raise BadRow(f"{place} has no content")
    return {"role": ROLES[said], "content": _content(content, place), **rest}


def _content(content: Any, place: str) -> str:
    if content is None:  # a turn that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise BadRow(f"{place} has a part that is not text; images and sound are not supported")
    raise BadRow(f"{place}: content must be text, not {_shape(content)}")


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{place}: a tool call needs a function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", place)
    outer = {key: value for key, value in call.items() if key == "id"}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(value: Any, place: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise BadRow(f"{place}: a tool call is not valid JSON: {error.msg} at column {error.colno}") from error


def _shape(value: Any) -> str:
    if value is None:
        return "missing"
    return "an empty list" if value == [] else f"a {type(value).__name__}: {str(value)[:60]!r}"
