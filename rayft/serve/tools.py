"""What `tools` and `tool_choice` of a request come to: which functions are shown, and which call is forced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayft.errors import UsageError
from rayft.inference.grammar import Grammar
from rayft.inference.grammar_limits import LONGEST_PATTERN, refused
from rayft.inference.grammar_text import JSON
from rayft.serve.job import Conversation
from rayft.serve.tool_markup import Markup
from rayft.serve.tool_style import ToolStyle

MOST_CALLS = 16
"""Calls of one answer that is forced to call: a model that never stops would fill its context with them."""
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

Tool = dict[str, Any]


def shown_tools(conversation: Conversation) -> list[Tool]:
    """The functions that the model is told of: none with `tool_choice: none`.

    Raises:
        UsageError: R818 for what is no function, or a choice of a function that is not there.
    """
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(conversation.tools)]
    names = [tool["function"]["name"] for tool in tools]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("R818", f"tools: two functions have the name {double[0]}")
    choice = conversation.tool_choice
    if choice == "required" and not tools:
        raise UsageError("R818", "tool_choice: a call is required, and there are no tools")
    if (name := chosen(choice)) is not None and name not in names:
        raise UsageError("R818", f"tool_choice: there is no function {name}", f"tools: {', '.join(names) or 'none'}")
    return [] if choice == "none" else tools


def chosen(choice: str) -> str | None:
    """The function that `function:NAME` names."""
    return choice.removeprefix("function:") if choice.startswith("function:") else None


def forced_call(style: ToolStyle, tools: Sequence[Tool], choice: str) -> Grammar | None:
    """What an answer must look like: one call of the named function, or one or more calls where they are required."""
    name = chosen(choice)
    if name is None and choice != "required":
        return None
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    most = MOST_CALLS if name is None and (style.begin or style.listed) else 1
    begin = f"<[{style.begin_id}]>" if style.begin_id is not None else _text(style.begin)
    opening, closing = f"{begin} {_text(style.lead)}", f"{_text(style.tail)} {_text(style.end)}"
    if style.listed:
        again = f' (", " call){{0,{most - 1}}}' if most > 1 else ""
        rules = [f'start: {opening} "[" call{again} "]" {closing}']
    else:
        again = f' ("\\n" one){{0,{most - 1}}}' if most > 1 else ""
        rules = [f"start: one{again}", f"one: {opening} call {closing}"]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        parameters = function.get("parameters") or NO_PARAMETERS
        if style.markup is not None:
            try:
                rules += _marked(style.markup, style.end, f"{index}", function["name"], parameters)
            except (TypeError, AttributeError, ValueError) as error:  # what is no schema can have any form
                raise refused("tools", f"the parameters of {function['name']} are no JSON schema: {error}") from error
            continue
        head = f"{{{json.dumps(style.name)}: {json.dumps(function['name'])}, {json.dumps(style.arguments)}: "
        rules.append(f"call_{index}: {_text(head)} arguments_{index} {_text('}')}")
        rules.append(f"arguments_{index}: {_json(parameters)}")
    return Grammar("lark", "\n".join(rules))


def _marked(markup: Markup, end: str, index: str, name: str, parameters: Mapping[str, Any]) -> list[str]:
    """The rules of one call that is written as markup: its arguments in the order of the schema, texts as they are."""
    properties = parameters.get("properties") or {}
    required = parameters.get("required") or ()
    shared = {key: value for key, value in parameters.items() if key in ("$defs", "definitions")}
    rules, parts = [], []
    for number, (key, schema) in enumerate(properties.items()):
        rule = f"argument_{index}_{number}"
        parts.append(rule if key in required else f"{rule}?")
        if isinstance(schema, Mapping) and schema.get("type") == "string":
            value = f"TEXT_{index}_{number}"
            rules.append(f"{value}: {_plain_text(name, key, schema, (markup.ended.strip(), end))}")
        else:
            value = f"value_{index}_{number}"
            rules.append(f"{value}: {_json({**schema, **shared} if isinstance(schema, Mapping) else {})}")
        rules.append(f"{rule}: {_text(f'{markup.key}{key}{markup.value}')} {value} {_text(markup.ended)}")
    head, tail = _text(f"{markup.opening}{name}{markup.named}"), _text(markup.closing)
    return [f"call_{index}: {' '.join([head, *parts, tail])}", *rules]


def _plain_text(name: str, key: str, schema: Mapping[str, Any], marks: Sequence[str]) -> str:
    """A text that does not end its own argument. Raises UsageError R817 for what cannot be enforced in it."""
    if "const" in schema or "enum" in schema:
        choices = [schema["const"]] if "const" in schema else schema["enum"]
        return " | ".join(_text(str(choice)) for choice in choices)
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if (unknown := sorted(schema.keys() & {"pattern", "format"})) or max(least, most or 0) > LONGEST_PATTERN:
        reason = f"{unknown[0]} of {key}" if unknown else f"more than {LONGEST_PATTERN} characters of {key}"
        hint = "its template writes texts without quotes; say what is wanted in the description"
        raise refused("tools", f"a forced call of {name} cannot keep to {reason}", hint)
    outside = " ".join(f"& ~/(?s:.*){re.escape(mark).replace('/', chr(92) + '/')}(?s:.*)/" for mark in marks)
    return f"/(?s:.{{{least},{most}}})/ {outside}"


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON})}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _tool(tool: Mapping[str, Any], place: str) -> Tool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError("R818", f"{place}: a tool is a function with a name")
    if not re.fullmatch(r"[\w.-]{1,128}", function["name"], re.ASCII):
        raise UsageError("R818", f"{place}: a name is 1 to 128 letters, digits, dots, dashes or underscores")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise UsageError("R818", f"{place}: parameters are a JSON schema")
    return {"type": "function", "function": dict(function)}
