"""Content and calls out of a stream, however it is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.serve.tool_parser import ToolParser
from rayft.serve.tool_style import PLAIN, ToolStyle
from tests.serve.templates import CLOCK, WEATHER
from tests.serve.test_tools import CODER_MARKUP, GLM_MARKUP

HERMES = ToolStyle("<tool_call>", "</tool_call>", "\n", "\n")
MISTRAL = ToolStyle("[TOOL_CALLS]", lead=" ", listed=True)
CODER = ToolStyle("<tool_call>", "</tool_call>", "\n", markup=CODER_MARKUP)
GLM = ToolStyle("<tool_call>", "</tool_call>", markup=GLM_MARKUP)
SPECIAL = ToolStyle("[TOOL_CALLS]", lead=" ", listed=True, begin_id=7)
LLAMA = ToolStyle(arguments="parameters")
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
AS_TEXT = json.dumps({"name": "get_weather", "parameters": '{"city": "Paris"}'})
NOW = '{"name": "clock", "arguments": {}}'

CODED = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>"
TICK = "<function=clock>\n</function>"

Outcome = tuple[str, list[tuple[str, Any]]]


def parsed(style: ToolStyle, pieces: list[str]) -> Outcome:
    parser = ToolParser(style, [WEATHER, CLOCK])
    results = [*(parser.push(piece) for piece in pieces), parser.finish()]
    calls = [(call.name, json.loads(call.arguments)) for _, calls in results for call in calls]
    return "".join(content for content, _ in results), calls


weather, clock = ("get_weather", {"city": "Paris"}), ("clock", {})
three_days = ("get_weather", {"city": "Paris", "days": 3})


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        (HERMES, "Paris is fine.", ("Paris is fine.", [])),
        (HERMES, f"<tool_call>\n{PARIS}\n</tool_call>", ("", [weather])),
        (HERMES, f"\n\n<tool_call>\n{PARIS}\n</tool_call>\n", ("", [weather])),
        (HERMES, f"Let me see.\n<tool_call>{PARIS}</tool_call>", ("Let me see.\n", [weather])),
        (HERMES, f"<tool_call>{PARIS}</tool_call>\n<tool_call>{NOW}</tool_call>", ("", [weather, clock])),
        (HERMES, f"<tool_call>{PARIS}</tool_call> Done.", (" Done.", [weather])),
        (HERMES, f"<tool_call>\n{PARIS}", ("", [weather])),
        (HERMES, f"{PARIS}", ("", [weather])),
        (HERMES, '<tool_call>\n{"name": "clo', ('<tool_call>\n{"name": "clo', [])),
        (HERMES, "<tool_call> is a mark", ("<tool_call> is a mark", [])),
        (HERMES, "a < b <tool", ("a < b <tool", [])),
        (HERMES, f"<tool_call>{{x}}</tool_call><tool_call>{NOW}</tool_call>", ("<tool_call>{x}</tool_call>", [clock])),
        (HERMES, f"{{ not closed <tool_call>{NOW}</tool_call>", ("{ not closed ", [clock])),
        (HERMES, '<tool_call>{"name": "rm", "arguments": {}}', ('<tool_call>{"name": "rm", "arguments": {}}', [])),
        (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}', ("", [weather])),
        (
            LLAMA,
            f'{NOW}; {{"name": "get_weather", "parameters": "{{\\"city\\": \\"Paris\\"}}"}}',
            ("", [clock, weather]),
        ),
        (LLAMA, f"Use {NOW} for it.", (f"Use {NOW} for it.", [])),
        (LLAMA, '{"answer": 42}', ('{"answer": 42}', [])),
        (LLAMA, '{"name": "clock", "parameters": [1]}', ('{"name": "clock", "parameters": [1]}', [])),
        (MISTRAL, f"[TOOL_CALLS] [{PARIS}, {NOW}]", ("", [weather, clock])),
        (MISTRAL, f'[TOOL_CALLS] [{PARIS}, {{"name": "rm"}}]', (f'[TOOL_CALLS] [{PARIS}, {{"name": "rm"}}]', [])),
        (SPECIAL, f" [{PARIS}, {NOW}]", ("", [weather, clock])),
        (SPECIAL, " [1, 2]", (" [1, 2]", [])),
        (PLAIN, '{"tool": "get_weather", "arguments": {"city": "Paris"}}', ("", [weather])),
        (PLAIN, '{"type": "function", "function": {"name": "clock"}}', ("", [clock])),
        (
            PLAIN,
            '{"name": "get_weather", "arguments": {"city": "a } \\" {"}}',
            ("", [(weather[0], {"city": 'a } " {'})]),
        ),
        (CODER, f"Well.\n<tool_call>\n{CODED}\n</tool_call>", ("Well.\n", [three_days])),
        (CODER, f"<tool_call>{CODED}{TICK}</tool_call>\n<tool_call>\n{TICK}", ("", [three_days, clock, clock])),
        (CODER, f"<tool_call>\n{PARIS}\n</tool_call>", ("", [weather])),
        (CODER, f"<tool_call>\n{CODED[:-12]}", (f"<tool_call>\n{CODED[:-12]}", [])),
        (CODER, "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
         ("<tool_call>\n<function=rm>\n</function>\n</tool_call>", [])),
        (CODER, f"<tool_call> is a mark <tool_call>{TICK}</tool_call>", ("<tool_call> is a mark ", [clock])),
        (GLM, "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
         ("", [weather])),
        (GLM, "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n",
         ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n", [])),
        (GLM, "<tool_call>clock\n</tool_call> and", (" and", [clock])),
        (PLAIN, "  ", ("  ", [])),
        (PLAIN, f"{NOW}\n", ("", [clock])),
        (PLAIN, f"{NOW}; and", ("; and", [clock])),
    ],
)  # fmt: skip
def test_content_and_calls(style: ToolStyle, text: str, expected: Outcome) -> None:
    assert parsed(style, [text]) == expected
    assert parsed(style, list(text)) == expected


FRAGMENTS = st.sampled_from(
    [
        PARIS,
        NOW,
        "<tool_call>",
        "</tool_call>",
        CODED,
        "<function=",
        "</function>",
        "[TOOL_CALLS]",
        "[",
        "]",
        "{",
        "}",
        '"',
        "\n",
        " ",
        ",",
        ";",
        "text",
        "<",
    ]
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    style=st.sampled_from([HERMES, LLAMA, MISTRAL, SPECIAL, CODER, GLM]),
    parts=st.lists(FRAGMENTS, max_size=12),
    data=st.data(),
)
def test_pieces_do_not_matter_and_nothing_is_lost(style: ToolStyle, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    content, calls = parsed(style, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(style, pieces) == (content, calls)
    if not calls:
        assert content == text
    dropped = len(text) - len(content)
    assert dropped <= len(calls) * (len(CODED) + 40) + text.count(" ") + text.count("\n") + text.count(",;")


def test_content_is_not_held_back() -> None:
    parser = ToolParser(HERMES, [CLOCK])
    assert parser.push("Let me ")[0] == "Let me "
    assert parser.push("look <")[0] == "look "
    assert parser.push("b> <tool_")[0] == "<b> "
    assert parser.push(f"call>{NOW[:-1]}") == ("", ())
    content, (call,) = parser.push("}")
    assert (content, call.name, call.arguments) == ("", "clock", "{}")
    assert len(call.id) == 9 and call.id.isalnum()


def test_a_long_call_is_read_in_time() -> None:
    text = json.dumps({"name": "get_weather", "arguments": {"city": "x" * 40_000}})
    content, ((_, arguments),) = parsed(PLAIN, [text[at : at + 4] for at in range(0, len(text), 4)])
    assert content == "" and len(arguments["city"]) == 40_000
