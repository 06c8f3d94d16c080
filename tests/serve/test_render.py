"""Serving shows a model exactly what training showed it, and says what cannot be shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from rayft.config.data import Data
from rayft.data.formats import Example
from rayft.data.messages import as_messages, as_tools
from rayft.data.render import Renderer as TrainingRenderer
from rayft.errors import UsageError
from rayft.models.hub import fetch
from rayft.serve.job import Conversation
from rayft.serve.render import Renderer
from tests.conftest import CHATML
from tests.serve.templates import CLOCK, HERMES, LLAMA, WEATHER, mistral, tokenizer_with

CALL = {"id": "abc123456", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
ASKED = {"role": "user", "content": "What is the weather in Paris?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abc123456", "content": "sunny"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "And in "}, {"type": "text", "text": "Rome?"}]}
PLAIN_CHAT = [{"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "Sunny."}, PARTS]


def conversation(*messages: Any, **fields: Any) -> Conversation:
    return Conversation(tuple(messages), **fields)


def trained_prompt(tokenizer: Any, messages: list[Any], tools: Any = None) -> list[int]:
    """What training puts before the answer that follows these messages."""
    given = as_messages([*messages, {"role": "assistant", "content": "It is sunny there too."}], "messages")
    (rendered,) = TrainingRenderer(tokenizer, Data(train="x")).render(
        [Example(messages=given, tools=as_tools(tools), where="row 1")]
    )
    assert rendered.answer is not None
    return rendered.ids[: rendered.answer[0]].tolist()


@pytest.mark.parametrize("template", [CHATML, HERMES, LLAMA], ids=["chatml", "hermes", "llama"])
def test_prompts_are_those_of_training(template: str) -> None:
    tokenizer = tokenizer_with(template)
    ids = Renderer(tokenizer).ids(conversation(*PLAIN_CHAT))
    assert list(ids) == trained_prompt(tokenizer, PLAIN_CHAT)


@pytest.mark.parametrize("template", [HERMES, LLAMA], ids=["hermes", "llama"])
def test_prompts_with_tools_are_those_of_training(template: str) -> None:
    tokenizer = tokenizer_with(template)
    messages = [ASKED, CALLED, RESULT]
    ids = Renderer(tokenizer).ids(conversation(*messages, tools=(WEATHER,)))
    assert list(ids) == trained_prompt(tokenizer, messages, [WEATHER])
    text = tokenizer.decode(ids)
    assert '"get_weather"' in text and '{"city": "Paris"}' in text and "sunny" in text


@pytest.mark.smollm2
def test_prompts_of_a_real_model_are_those_of_training() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    for messages in (PLAIN_CHAT, PLAIN_CHAT[1:]):
        assert list(Renderer(tokenizer).ids(conversation(*messages))) == trained_prompt(tokenizer, messages)
    text = Renderer(tokenizer).text(conversation(ASKED, CALLED, RESULT, tools=(WEATHER,)))
    assert "Result of get_weather: sunny" in text and '"name": "get_weather"' in text


def test_text_is_tokenised_as_a_document_begins() -> None:
    tokenizer = mistral()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = Renderer(tokenizer).ids("Please order")
    assert ids == tuple(tokenizer("Please order")["input_ids"])
    assert Renderer(tokenizer).ids((5, 6)) == (5, 6)


def test_templates_without_tools_get_plain_messages() -> None:
    renderer = Renderer(tokenizer_with(CHATML))
    system = {"role": "system", "content": "Be brief."}
    assert renderer.text(conversation(system, ASKED, CALLED, RESULT, tools=(WEATHER, CLOCK))) == (
        "<|im_start|>system\nBe brief.\n\n"
        "You can call functions. To call one, answer with one JSON object and nothing else:"
        ' {"name": the name of the function, "arguments": an object with its arguments}. These are the functions:\n'
        f"{json.dumps(WEATHER['function'])}\n"
        '{"name": "clock"}<|im_end|>\n'
        "<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n"
        '<|im_start|>assistant\n{"name": "get_weather", "arguments": {"city": "Paris"}}<|im_end|>\n'
        "<|im_start|>user\nResult of get_weather: sunny<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "functions" not in renderer.text(conversation(ASKED, tools=(WEATHER,), tool_choice="none"))


def test_a_template_that_refuses_system_messages_gets_the_tools_with_the_question() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    text = Renderer(tokenizer_with(template)).text(conversation(ASKED, tools=(CLOCK,)))
    assert text.startswith("<|im_start|>user\nYou can call functions.") and "What is the weather" in text


def test_an_answer_that_has_begun_is_continued() -> None:
    renderer = Renderer(tokenizer_with(CHATML))
    begun = conversation(ASKED, {"role": "assistant", "content": "It is"}, continue_final_message=True)
    assert renderer.text(begun).endswith("<|im_start|>assistant\nIt is")
    ended = conversation(ASKED, {"role": "assistant", "content": "It is"}, add_generation_prompt=False)
    assert renderer.text(ended).endswith("It is<|im_end|>\n")


def test_arguments_reach_the_template() -> None:
    renderer = Renderer(tokenizer_with("{{ mood }}{{ messages[0].content }}"), {"mood": "gay "})
    assert renderer.text(conversation(ASKED)) == "gay What is the weather in Paris?"
    assert renderer.text(conversation(ASKED, template_kwargs={"mood": "sad "})).startswith("sad ")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% broken", "TemplateSyntaxError"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_refuses_says_why(template: str | None, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        Renderer(tokenizer_with(template)).ids(conversation(ASKED))
    assert error.value.id == "R818"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": ()}, "messages must be a list"),
        ({"messages": ({"role": "bishop", "content": "x"},)}, "bishop"),
        ({"messages": ({"role": "user"},)}, "no content"),
        ({"messages": ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]},)}, "not text"),
        ({"messages": ({"role": "assistant", "tool_calls": [{"function": {}}]},)}, "function with a name"),
        ({"tools": ({"type": "function"},)}, "function with a name"),
        ({"tools": ({"function": {"name": "a b"}},)}, "a name is"),
        ({"tools": ({"function": {"name": "a", "parameters": []}},)}, "JSON schema"),
        ({"tools": (CLOCK, CLOCK)}, "two functions"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tool_choice": "function:rm", "tools": (CLOCK,)}, "no function rm"),
        ({"template_kwargs": {"chat_template": "{{ 1 }}"}}, "not for the template"),
        ({"template_kwargs": {"tokenize": True}}, "not for the template"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        Renderer(tokenizer_with(CHATML)).ids(Conversation(**({"messages": (ASKED,)} | fields)))
    assert error.value.id == "R818"
