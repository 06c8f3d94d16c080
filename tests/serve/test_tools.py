"""The style of a template, and calls that are forced in it: what a model then writes, the template would write too."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from rayft.errors import UsageError
from rayft.inference.guide import Guides
from rayft.serve.job import Conversation
from rayft.serve.render import Renderer
from rayft.serve.tool_markup import Markup, typed
from rayft.serve.tool_style import PLAIN, ToolStyle, tool_style
from tests.conftest import CHATML
from tests.inference.test_guide import walk
from tests.serve.templates import CLOCK, CODER, GLM, HERMES, INVOKE, LLAMA, WEATHER, mistral, tokenizer_with

ASKED = {"role": "user", "content": "What is the weather in Paris?"}
THINKING = HERMES.replace("{% generation %}", "{% generation %}<think>\n\n</think>\n\n")
TEMPLATES = {"chatml": CHATML, "hermes": HERMES, "llama": LLAMA, "coder": CODER, "glm": GLM, "invoke": INVOKE}
CODER_MARKUP = Markup("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>\n")
GLM_MARKUP = Markup("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "")
INVOKE_MARKUP = Markup('<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>\n")
FORGETFUL = HERMES.replace("message.tool_calls or []", "[]")


def test_the_style_is_what_the_template_writes() -> None:
    hermes = ToolStyle("<tool_call>", "</tool_call>", "\n", "\n", native=True)
    assert tool_style(tokenizer_with(HERMES)) == hermes
    assert tool_style(tokenizer_with(THINKING)) == hermes
    assert tool_style(tokenizer_with(LLAMA)) == ToolStyle(arguments="parameters", native=True)
    tokenizer = mistral()
    id = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert tool_style(tokenizer) == ToolStyle("[TOOL_CALLS]", lead=" ", listed=True, begin_id=id, native=True)


@pytest.mark.parametrize(
    ("template", "begin", "lead", "markup", "end"),
    [
        (CODER, "<tool_call>", "\n", CODER_MARKUP, "</tool_call>"),
        (CODER.replace("{% generation %}", "{% generation %}<think>\n\n</think>\n\n"),
         "<tool_call>", "\n", CODER_MARKUP, "</tool_call>"),
        (GLM, "<tool_call>", "", GLM_MARKUP, "</tool_call>"),
        (INVOKE, "<tools:call>", "\n", INVOKE_MARKUP, "</tools:call>"),
    ],
)  # fmt: skip
def test_markup_is_learnt(template: str, begin: str, lead: str, markup: Markup, end: str) -> None:
    assert tool_style(tokenizer_with(template)) == ToolStyle(begin, end, lead, markup=markup, native=True)


@pytest.mark.parametrize("template", [CODER, GLM, INVOKE])
def test_what_the_template_writes_is_read_again(template: str) -> None:
    """Texts with blanks, quotes and brackets of their own, and values of every type."""
    arguments = {
        "a": ' two\nlines {"x": <b>}\n',
        "b": 3,
        "c": -0.5,
        "d": True,
        "e": None,
        "f": ["x", {"y": 1}],
        "g": "7",
    }
    parameters = {"type": "object", "properties": {key: {} for key in arguments} | {"g": {"type": "string"}}}
    parameters["properties"]["a"] = {"type": "string"}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    calls = [{"type": "function", "function": {"name": "f", "arguments": given}} for given in (arguments, {})]
    renderer = Renderer(tokenizer_with(template))
    talk = Conversation((ASKED, {"role": "assistant", "content": "Well.", "tool_calls": calls}), tools=(tool,),
                        add_generation_prompt=False)  # fmt: skip
    prompt = renderer.text(Conversation((ASKED,), tools=(tool,)))
    answer = renderer.text(talk).removeprefix(prompt).partition("<|im_end|>")[0]
    for pieces in ([answer], list(answer)):
        parser = renderer.parser(talk)
        assert parser is not None
        results = [*(parser.push(piece) for piece in pieces), parser.finish()]
        assert "".join(content for content, _ in results).strip() == "Well."
        found = [(call.name, json.loads(call.arguments)) for _, calls in results for call in calls]
        assert found == [("f", arguments), ("f", {})]


@pytest.mark.parametrize("template", [None, CHATML, FORGETFUL, "{{ raise_exception('no') }}", "{% broken"])
def test_a_template_that_does_not_know_calls_gets_the_plain_style(template: str | None) -> None:
    assert tool_style(tokenizer_with(template)) == PLAIN


def forced(tokenizer: Any, seed: int, choice: str) -> tuple[str, list[tuple[str, Any]]]:
    """(content, calls) of random tokens under the grammar."""
    renderer = Renderer(tokenizer)
    conversation = Conversation((ASKED,), tools=(WEATHER, CLOCK), tool_choice=choice)
    grammar, parser = renderer.forced_call(conversation), renderer.parser(conversation)
    assert grammar is not None and parser is not None
    ids = walk(Guides(len(tokenizer)).guide(grammar, tokenizer, {tokenizer.eos_token_id}), seed, limit=3000)
    content, calls = parser.push(tokenizer.decode(ids, skip_special_tokens=True))
    rest, more = parser.finish()
    return content + rest, [(call.name, json.loads(call.arguments)) for call in (*calls, *more)]


@pytest.mark.parametrize("style", [*TEMPLATES, "mistral"])
def test_a_forced_call_is_a_valid_one(style: str) -> None:
    tokenizer = mistral() if style == "mistral" else tokenizer_with(TEMPLATES[style])
    names, counts = set(), set()
    for seed in range(8):
        content, calls = forced(tokenizer, seed, "required")
        assert content == "" and calls
        for name, arguments in calls:
            schema = WEATHER["function"]["parameters"] if name == "get_weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
        names |= {name for name, _ in calls}
        counts.add(len(calls))
        content, ((name, _),) = forced(tokenizer, seed, "function:clock")
        assert (content, name) == ("", "clock")
    assert names == {"get_weather", "clock"}
    assert (max(counts) > 1) == (style not in ("chatml", "llama"))


def test_a_call_is_forced_only_where_it_is_asked_for() -> None:
    renderer = Renderer(tokenizer_with(HERMES))
    for choice in ("auto", "none"):
        assert renderer.forced_call(Conversation((ASKED,), tools=(CLOCK,), tool_choice=choice)) is None
    assert renderer.parser(Conversation((ASKED,), tools=(CLOCK,), tool_choice="none")) is None
    assert renderer.parser(Conversation((ASKED,))) is None


def test_parameters_that_cannot_be_enforced_are_refused() -> None:
    tokenizer = tokenizer_with(HERMES)
    for schema in ({"type": "object", "properties": {"a": {"$ref": "https://example.com/a"}}}, {"type": "strin"}):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        grammar = Renderer(tokenizer).forced_call(Conversation((ASKED,), tools=(tool,), tool_choice="required"))
        assert grammar is not None
        with pytest.raises(UsageError, match="R817"):
            Guides(len(tokenizer)).guide(grammar, tokenizer, {2})


def test_what_markup_cannot_keep_to_is_refused() -> None:
    for properties in (
        {"a": {"type": "string", "pattern": "^a"}},
        {"a": {"type": "string", "maxLength": 10**6}},
        {"a": {"type": "string", "minLength": "x"}},
        {"a": {"type": "string", "enum": 5}},
        ["a"],
    ):
        parameters = {"type": "object", "properties": properties}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        with pytest.raises(UsageError, match="R817"):
            Renderer(tokenizer_with(CODER)).forced_call(Conversation((ASKED,), tools=(tool,), tool_choice="required"))


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "integer"}, 3),
        ("3", {"type": "string"}, "3"),
        ("3", {"type": "number"}, 3),
        ("3", {"type": ["string", "null"]}, "3"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("True", {"type": "boolean"}, True),
        ("Paris", {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "Paris"),
        ("4", {"$ref": "#/$defs/days"}, 4),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ("NaN", {"type": "number"}, "NaN"),
        ('{"a": 1}', None, {"a": 1}),
        ("5", {"type": 5}, 5),
        ("5", {"anyOf": 5}, 5),
        ("5", {"$ref": "#/nowhere"}, 5),
        ("5", {"type": [{}, "string"]}, "5"),
    ],
)
def test_a_value_has_the_type_of_its_schema(text: str, schema: Any, value: Any) -> None:
    found = typed(text, schema, {"$defs": {"days": {"type": "integer"}}})
    assert found == value and type(found) is type(value)
