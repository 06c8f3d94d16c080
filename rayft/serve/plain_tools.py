"""Tools for chat templates that know nothing of them: functions, calls and results as plain messages.

The functions stand in the system message, a call is an answer of the assistant that is one JSON object, and a result
comes from the user. docs/structured-output.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

INSTRUCTION = (
    "You can call functions. To call one, answer with one JSON object and nothing else:"
    ' {"name": the name of the function, "arguments": an object with its arguments}. These are the functions:'
)


def with_plain_tools(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """messages as `rayft.data.messages.as_messages` makes them."""
    names = {call.get("id"): call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    plain = [_plain(message, names) for message in messages]
    if not tools:
        return plain
    text = "\n".join([INSTRUCTION, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The system message at the head of the first message of the user, for templates that refuse one."""
    first, second, *rest = messages
    return [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest]


def _plain(message: Message, names: dict[Any, str]) -> Message:
    if message["role"] == "tool":
        name = message.get("name") or names.get(message.get("tool_call_id"))
        return {"role": "user", "content": f"Result of {name or 'the call'}: {message['content']}"}
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    return {"role": "assistant", "content": "\n".join([*filter(None, [message["content"]]), *calls])}
