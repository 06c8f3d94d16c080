"""Which tokens are trained on: exactly the assistant's text and its end-of-turn token, whatever the chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rayft.config.data import Data
from rayft.data.formats import Example
from rayft.data.render import Rendered, Renderer
from rayft.errors import UsageError

TEMPLATES = ["chatml", "llama3", "mistral", "gemma", "qwen3"]
END = {
    "chatml": "<|im_end|>",
    "chatml_generation": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
}
LEAD = {"mistral": " "}
"""Blank that the template puts before an answer and that the generation prompt lacks: the model writes it."""

USER = {"role": "user", "content": "What is the weather in Paris?"}
SYSTEM = {"role": "system", "content": "Answer with one word."}
SUNNY = {"role": "assistant", "content": "Sunny, 20 degrées 🌞"}
AGAIN = {"role": "user", "content": "And in the evening?"}
RAIN = {"role": "assistant", "content": "A little rain.\n\nTake  an umbrella "}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
}
RESULT = {"role": "tool", "content": '{"sky": "blue"}'}

Make = Callable[..., Any]


def render(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, objective: Any = "sft", **data: Any
) -> Rendered:
    settings = Data.model_validate({"train": "unused", **data})
    return Renderer(tokenizer, settings, objective).render([Example("row 1", messages, tools)])[0]


def supervised_texts(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The text of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.supervised, [0]])))
    return [tokenizer.decode(rendered.ids[start:end]) for start, end in edges.reshape(-1, 2)]


def reference_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **arguments: Any) -> list[int]:
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return tokenizer.apply_chat_template(plain, tools=tools, tokenize=True, **arguments)["input_ids"]


def answer(template: str, message: dict[str, Any]) -> str:
    said = message["content"].strip() if template in ("llama3", "gemma") else message["content"]
    return LEAD.get(template, "") + said + END[template]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [USER, SUNNY],
        [SYSTEM, USER, SUNNY],
        [USER, SUNNY, AGAIN, RAIN],
        [SYSTEM, USER, SUNNY, AGAIN, RAIN],
        [SYSTEM, USER, SUNNY, AGAIN, SUNNY, AGAIN, SUNNY],
        [USER, SUNNY, AGAIN, RAIN, USER],
    ],
    ids=["single", "system", "multi-turn", "system and multi-turn", "same answer thrice", "ends with a question"],
)
def test_supervised_text_is_the_assistants(make_tokenizer: Make, template: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer(template)
    rendered = render(tokenizer, messages)
    said = [message for message in messages if message["role"] == "assistant"]
    assert supervised_texts(tokenizer, rendered) == [answer(template, message) for message in said]
    assert rendered.ids.tolist() == reference_ids(tokenizer, messages)
    assert rendered.weights.tolist() == rendered.supervised.astype(float).tolist()
    assert rendered.answer is not None
    start, end = rendered.answer
    assert tokenizer.decode(rendered.ids[start:end]) == answer(template, said[-1])


@pytest.mark.parametrize(
    ("template", "call"),
    [
        ("chatml", '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call><|im_end|>'),
        ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}<|eom_id|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'),
        ("qwen3", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'),
    ],
)
@pytest.mark.parametrize("before", [[], [SYSTEM], [SYSTEM, USER, SUNNY]], ids=["first", "system", "after a turn"])
def test_tool_calls_are_supervised_and_results_are_not(
    make_tokenizer: Make, template: str, call: str, before: list[dict[str, Any]]
) -> None:
    tokenizer = make_tokenizer(template)
    messages = [*before, USER, CALL, RESULT, SUNNY]
    rendered = render(tokenizer, messages, TOOLS)
    earlier = [answer(template, SUNNY)] if SUNNY in before else []
    assert supervised_texts(tokenizer, rendered) == [*earlier, call, answer(template, SUNNY)]
    assert rendered.ids.tolist() == reference_ids(tokenizer, messages, TOOLS)


def test_tool_call_of_an_earlier_turn_in_a_template_that_rewrites_history(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("qwen3")
    thinking = {**CALL, "reasoning_content": "I must look."}
    rendered = render(tokenizer, [USER, thinking, RESULT, SUNNY, AGAIN, RAIN], TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert supervised_texts(tokenizer, rendered) == [call, answer("qwen3", SUNNY), answer("qwen3", RAIN)]


def test_thinking_is_supervised_where_the_template_keeps_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("qwen3")
    first = {"role": "assistant", "content": "<think>\nsky?\n</think>\n\nSunny."}
    second = {"role": "assistant", "content": "Rain.", "reasoning_content": "clouds"}
    rendered = render(tokenizer, [USER, first, AGAIN, second])
    kept = "<think>\nclouds\n</think>\n\nRain.<|im_end|>"
    assert supervised_texts(tokenizer, rendered) == ["Sunny.<|im_end|>", kept]


def test_empty_thinking_is_supervised_only_where_the_data_has_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("qwen3")
    rendered = render(tokenizer, [USER, SUNNY])
    assert "<think>\n\n</think>\n\n" in tokenizer.decode(rendered.ids)  # put in by the template
    assert supervised_texts(tokenizer, rendered) == [answer("qwen3", SUNNY)]
    explicit = {"role": "assistant", "content": "<think>\n\n</think>\n\nSunny."}
    assert supervised_texts(tokenizer, render(tokenizer, [USER, explicit])) == [explicit["content"] + "<|im_end|>"]


def test_generation_prompt_with_thinking_switched_off(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("qwen3")
    messages = [USER, SUNNY, AGAIN, RAIN]
    rendered = render(tokenizer, messages, chat_template_kwargs={"enable_thinking": False})
    assert supervised_texts(tokenizer, rendered) == [answer("qwen3", SUNNY), answer("qwen3", RAIN)]
    assert rendered.ids.tolist() == reference_ids(tokenizer, messages, enable_thinking=False)


def test_generation_prompt_that_opens_the_thinking(make_tokenizer: Make) -> None:
    """As of models that always think: the model goes on after `<think>`, which earlier turns do not even have."""
    tokenizer = make_tokenizer("qwen3")
    opening = "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- if false -%}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- '<|im_start|>assistant\\n' -}}\n    {%- if enable_thinking",
        opening + "{%- endif -%}{%- if enable_thinking",
    )
    assert tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True).endswith("<think>\n")
    thinking = {**RAIN, "reasoning_content": "clouds"}
    kept = "clouds\n</think>\n\n" + answer("qwen3", RAIN)
    assert supervised_texts(tokenizer, render(tokenizer, [USER, SUNNY, AGAIN, thinking])) == [
        answer("qwen3", SUNNY),
        kept,
    ]
    rendered = render(tokenizer, [USER, SUNNY, AGAIN, RAIN])
    assert supervised_texts(tokenizer, rendered) == [answer("qwen3", SUNNY), answer("qwen3", RAIN)]


@pytest.mark.parametrize("messages", [[USER, SUNNY], [SYSTEM, USER, SUNNY, AGAIN, RAIN], [USER, SUNNY, AGAIN]])
def test_mask_equals_that_of_transformers(make_tokenizer: Make, messages: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer("chatml_generation")
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    ours = render(tokenizer, messages)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.supervised.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_train_on(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = [SYSTEM, USER, SUNNY, AGAIN, RAIN]
    last = render(tokenizer, messages, train_on="last_assistant")
    assert supervised_texts(tokenizer, last) == [answer(template, RAIN)]
    whole = render(tokenizer, messages, train_on="all")
    assert whole.weights.tolist() == [0.0] + [1.0] * (len(whole.ids) - 1)
    pretraining = render(tokenizer, messages, objective="clm")
    assert pretraining.weights.tolist() == whole.weights.tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_weight_zero_takes_a_turn_out(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = [USER, {**SUNNY, "weight": 0}, AGAIN, {**RAIN, "weight": 1}]
    rendered = render(tokenizer, messages)
    assert supervised_texts(tokenizer, rendered) == [answer(template, RAIN)]
    whole = render(tokenizer, messages, train_on="all")
    ids = np.where(whole.weights[1:] == 0, whole.ids[1:], tokenizer.pad_token_id)
    assert tokenizer.decode(ids).replace("<pad>", "") == answer(template, SUNNY)


def test_weights_of_messages_and_of_the_rest(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    messages = [SYSTEM, {**USER, "weight": 0}, {**SUNNY, "weight": 0.5}, AGAIN, {**RAIN, "weight": 0}]
    rendered = render(tokenizer, messages, prompt_loss_weight=0.25)
    parts = {
        weight: tokenizer.decode(rendered.ids[1:][np.isclose(rendered.weights[1:], weight)])
        for weight in (0, 0.25, 0.5)
    }
    assert parts[0.5] == answer("chatml", SUNNY)
    assert parts[0] == f"<|im_start|>user\n{USER['content']}<|im_end|>\n" + answer("chatml", RAIN)
    assert parts[0.25] == (
        f"system\n{SYSTEM['content']}<|im_end|>\n<|im_start|>assistant\n\n"
        f"<|im_start|>user\n{AGAIN['content']}<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert rendered.weights[0] == 0


def test_given_turns_of_a_prompt_are_not_supervised(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    example = Example("row 1", [USER, SUNNY, AGAIN, RAIN], context=3)
    rendered = Renderer(tokenizer, Data.model_validate({"train": "unused"})).render([example])[0]
    assert supervised_texts(tokenizer, rendered) == [answer("chatml", RAIN)]


def test_turns_through_stand_ins_when_no_prefix_can_be_rendered(make_tokenizer: Make) -> None:
    """A template that writes the number of messages first: nothing is a prefix of anything."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}\n" + tokenizer.chat_template
    rendered = render(tokenizer, [SYSTEM, USER, SUNNY, AGAIN, RAIN])
    assert supervised_texts(tokenizer, rendered) == [answer("chatml", SUNNY), answer("chatml", RAIN)]


def test_assistant_speaks_first(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    assert supervised_texts(tokenizer, render(tokenizer, [SUNNY, AGAIN, RAIN])) == [
        answer("chatml", SUNNY),
        answer("chatml", RAIN),
    ]


def test_template_that_knows_no_generation_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    rendered = render(tokenizer, [USER, SUNNY, AGAIN, RAIN])
    assert supervised_texts(tokenizer, rendered) == [answer("chatml", SUNNY), answer("chatml", RAIN)]


def test_end_marker_that_is_no_token_of_the_tokenizer(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    template = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}[end]\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    rendered = render(tokenizer, [USER, SUNNY, AGAIN, {**RAIN, "content": "Rain"}], chat_template=template)
    assert supervised_texts(tokenizer, rendered) == [SUNNY["content"] + "[end]", "Rain[end]"]


def test_text_after_the_end_token_of_the_last_turn(make_tokenizer: Make) -> None:
    """Phi-3's way: the whole text is closed by a further token that no turn of the history has."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template += "{% if not add_generation_prompt %}</s>{% endif %}"
    rendered = render(tokenizer, [USER, SUNNY, AGAIN, RAIN])
    assert supervised_texts(tokenizer, rendered) == [answer("chatml", SUNNY), answer("chatml", RAIN)]


def test_tool_calls_that_end_with_a_token_of_their_own(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    end = "{{- '<|eom_id|>\\n' if message.tool_calls else '<|im_end|>\\n' -}}\n    {%- endif -%}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- '<|im_end|>\\n' -}}\n    {%- endif -%}", end)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call><|eom_id|>'
    rendered = render(tokenizer, [USER, CALL, RESULT, SUNNY])
    assert supervised_texts(tokenizer, rendered) == [call, answer("chatml", SUNNY)]


def test_template_that_hides_the_turn_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    template = "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(UsageError, match=r"R211: row 1: assistant turn 2 cannot be located.*messages \| length"):
        render(tokenizer, [USER, SUNNY], chat_template=template)


def test_conversation_that_the_template_refuses(make_tokenizer: Make) -> None:
    with pytest.raises(UsageError, match=r"R210: row 1: the chat template refuses.*must alternate"):
        render(make_tokenizer("mistral"), [USER, USER, SUNNY])


def test_conversation_without_chat_template(make_tokenizer: Make) -> None:
    with pytest.raises(UsageError, match="R209: row 1: the tokenizer has no chat template"):
        render(make_tokenizer(), [USER, SUNNY])


def test_chat_template_from_a_file(make_tokenizer: Make, tmp_path: Any) -> None:
    tokenizer = make_tokenizer("chatml")
    file = tmp_path / "own.jinja"
    file.write_text(tokenizer.chat_template)
    rendered = render(make_tokenizer(), [USER, SUNNY], chat_template=str(file))
    assert supervised_texts(tokenizer, rendered) == [answer("chatml", SUNNY)]
    with pytest.raises(UsageError, match="R209"):
        render(make_tokenizer(), [USER, SUNNY], chat_template=str(tmp_path / "missing.jinja"))


def plain(tokenizer: Any, objective: Any = "sft", data: dict[str, Any] | None = None, **fields: Any) -> Rendered:
    settings = Data.model_validate({"train": "unused", **(data or {})})
    return Renderer(tokenizer, settings, objective).render([Example("row 1", **fields)])[0]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompt_and_completion_without_template(make_tokenizer: Make, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    rendered = plain(tokenizer, prompt="What is the weather? ", completion=" It is sunny. ")
    assert supervised_texts(tokenizer, rendered) == [" It is sunny. </s>"]
    bos = "<s>" if adds_bos else ""
    assert tokenizer.decode(rendered.ids) == f"{bos}What is the weather?  It is sunny. </s>"
    everything = plain(tokenizer, prompt="a", completion="b", data={"train_on": "all"})
    assert everything.weights.tolist() == [0.0] + [1.0] * (len(everything.ids) - 1)


@pytest.mark.parametrize("text", ["It is sunny.", "<s>It is sunny.", "It is sunny.</s>"])
def test_raw_text_has_one_bos_and_one_eos(make_tokenizer: Make, text: str) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    rendered = plain(tokenizer, objective="clm", text=text)
    assert tokenizer.decode(rendered.ids) == "<s>It is sunny.</s>"
    assert rendered.weights.tolist() == [0.0] + [1.0] * (len(rendered.ids) - 1)


def test_batch_of_mixed_examples_keeps_its_order(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    examples = [Example("1", text="one"), Example("2", [USER, SUNNY]), Example("3", text="three")]
    rendered = Renderer(tokenizer, Data.model_validate({"train": "unused"})).render(examples)
    assert tokenizer.decode(rendered[0].ids) == "one<|im_end|>"
    assert tokenizer.decode(rendered[2].ids) == "three<|im_end|>"
    assert rendered[1].ids.tolist() == reference_ids(tokenizer, [USER, SUNNY])
