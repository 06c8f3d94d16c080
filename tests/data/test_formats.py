"""Every format of rows becomes the same small Example."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayft.config.data import Source
from rayft.data.formats import Example, Format
from rayft.data.sources import Row
from rayft.errors import UsageError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def example(values: dict[str, Any], **source: Any) -> Example:
    return Format(Source(path="rows.jsonl", **source), values).example(Row(values, "rows.jsonl:1"))


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": [USER, ANSWER], "system": "Be brief."},
        {"messages": json.dumps([SYSTEM, USER, ANSWER])},
        {
            "messages": [
                SYSTEM,
                {**USER, "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]},
                ANSWER,
            ]
        },
        {"conversations": [SYSTEM, USER, ANSWER]},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Hello."},
            ]
        },
    ],
)
def test_conversations(values: dict[str, Any]) -> None:
    read = example(values)
    assert read.messages == [SYSTEM, USER, ANSWER]
    assert (read.context, read.prompt, read.text, read.tools) == (0, None, None, None)


@pytest.mark.parametrize(
    "call",
    [CALL, CALL["function"], {"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}],
)
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [TOOLS[0]["function"]]])
def test_tool_calls_and_tools(call: Any, tools: Any) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    read = example({"messages": [USER, turn, {"role": "tool", "content": "blue"}, ANSWER], "tools": tools})
    assert read.messages is not None
    assert read.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read.tools == TOOLS


def test_tool_calls_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Hi?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "Hello."},
    ]
    read = example({"conversations": turns, "tools": "[]"})
    assert read.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "blue"},
        ANSWER,
    ]
    assert read.tools is None


def test_alpaca() -> None:
    read = example({"instruction": "Sum up.", "input": "Long text", "output": "Short", "system": "Be brief."})
    assert read.messages == [
        SYSTEM,
        {"role": "user", "content": "Sum up.\n\nLong text"},
        {"role": "assistant", "content": "Short"},
    ]
    assert (read.prompt, read.completion) == ("Be brief.\n\nSum up.\n\nLong text\n\n", "Short")
    without = example({"instruction": "Sum up.", "input": "", "output": "Short"})
    assert without.messages is not None
    assert without.messages[0]["content"] == "Sum up."


@pytest.mark.parametrize("name", ["completion", "response"])
def test_prompt_and_completion_texts(name: str) -> None:
    read = example({"prompt": "Hi?", name: "Hello."})
    assert read == Example("rows.jsonl:1", [USER, ANSWER], context=1, prompt="Hi?", completion="Hello.")


def test_prompt_and_completion_messages() -> None:
    read = example({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert (read.messages, read.context, read.prompt) == ([USER, ANSWER, USER, ANSWER], 3, None)
    assert example({"prompt": [SYSTEM, USER], "completion": "Hello."}).messages == [SYSTEM, USER, ANSWER]


def test_completion_that_looks_like_a_list_stays_text() -> None:
    assert example({"prompt": "Hi?", "completion": '[{"a": 1}]'}).completion == '[{"a": 1}]'


def test_raw_text_and_numbers() -> None:
    assert example({"text": "Once upon a time"}).text == "Once upon a time"
    assert example({"prompt": "2+2=", "completion": 4}).completion == "4"


def test_columns_and_templates() -> None:
    values = {"text": "Long {text}", "summary": "Short", "n": 3, "messages": [USER]}
    read = example(values, columns={"prompt": "Summarize in {n}: {text}", "response": "{summary}{{}}"})
    assert (read.prompt, read.completion) == ("Summarize in 3: Long {text}", "Short{}")
    read = example({"question": "Hi?", "answer": "Hello."}, columns={"prompt": "question", "completion": "answer"})
    assert read.messages == [USER, ANSWER]
    assert example({"body": "x", "prompt": "y", "completion": "z"}, columns={"text": "body"}).text == "x"


def test_given_format_goes_before_detection() -> None:
    values = {"messages": [USER, ANSWER], "text": "raw"}
    assert example(values, format="text").text == "raw"
    assert example(values).messages == [USER, ANSWER]


def test_unknown_column_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"R206: .*rows\.jsonl: columns\.prompt names a column 'qestion'") as raised:
        example({"question": "a", "answer": "b"}, columns={"prompt": "{qestion}", "completion": "answer"})
    assert "columns that exist: answer, question" in str(raised.value)
    with pytest.raises(UsageError, match=r"R206: .*unknown name 'propmt'"):
        example({"question": "a"}, columns={"propmt": "question"})
    with pytest.raises(UsageError, match=r"R206: .*is no template"):
        example({"question": "a"}, columns={"prompt": "{question"})


def test_format_that_cannot_be_told() -> None:
    with pytest.raises(UsageError, match=r"R207: .*no known format fits; its columns are answer, question") as raised:
        example({"question": "a", "answer": "b"})
    assert "prompt_completion (prompt, completion)" in str(raised.value)
    with pytest.raises(UsageError, match=r"R207: .*format alpaca needs instruction, output"):
        example({"question": "a"}, format="alpaca")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"messages": []}, "messages must be a list of messages, not an empty list"),
        ({"messages": "Hi"}, "messages must be a list of messages, not a str: 'Hi'"),
        ({"messages": ["Hi"]}, r"messages\[0\] must be an object with role and content"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, r"messages\[0\] has role 'asistant'; known: system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "images and sound"),
        ({"messages": [{**ANSWER, "weight": "no"}]}, "weight must be a number from 0 to 1, not 'no'"),
        ({"messages": [{**ANSWER, "tool_calls": [{"id": "1"}]}]}, "a tool call needs a function with a name"),
        ({"conversations": [{"from": "function_call", "value": "{look"}]}, "a tool call is not valid JSON"),
        ({"messages": [USER], "tools": "look"}, "tools must be a list of JSON schemas"),
        ({"prompt": None, "completion": "x"}, "prompt must be text, not missing"),
        ({"text": {"a": 1}}, "text must be text, not a dict"),
    ],
)
def test_rows_that_do_not_fit(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=rf"R208: rows\.jsonl:1: not a row of format \w+: .*{reason}"):
        example(values)
