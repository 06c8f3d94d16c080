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
from rayft.serve.tool_style import PLAIN, ToolStyle, tool_style
from tests.conftest import CHATML
from tests.inference.test_guide import walk
from tests.serve.templates import CLOCK, HERMES, LLAMA, WEATHER, mistral, tokenizer_with

ASKED = {"role": "user", "content": "What is the weather in Paris?"}
THINKING = HERMES.replace("{% generation %}", "{% generation %}<think>\n\n</think>\n\n")
FORGETFUL = HERMES.replace("message.tool_calls or []", "[]")


def test_the_style_is_what_the_template_writes() -> None:
    hermes = ToolStyle("<tool_call>", "</tool_call>", "\n", "\n", native=True)
    assert tool_style(tokenizer_with(HERMES)) == hermes
    assert tool_style(tokenizer_with(THINKING)) == hermes
    assert tool_style(tokenizer_with(LLAMA)) == ToolStyle(arguments="parameters", native=True)
    tokenizer = mistral()
    id = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert tool_style(tokenizer) == ToolStyle("[TOOL_CALLS]", lead=" ", listed=True, begin_id=id, native=True)


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


@pytest.mark.parametrize("style", ["chatml", "hermes", "llama", "mistral"])
def test_a_forced_call_is_a_valid_one(style: str) -> None:
    tokenizer = (
        mistral() if style == "mistral" else tokenizer_with({"hermes": HERMES, "llama": LLAMA}.get(style, CHATML))
    )
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
    assert (max(counts) > 1) == (style in ("hermes", "mistral"))


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
