"""Chat templates in the ways of well-known models, on the tests' tokenizer."""

from __future__ import annotations

from typing import Any

from tests.conftest import CHATML, tiny_tokenizer

HERMES = """{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}
{% endif %}
Functions:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' %}<|im_start|>{{ message.role }}
{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>{% endgeneration %}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """{%- for message in messages %}
{%- if message.tool_calls %}<|im_start|>assistant
{%- set call = message.tool_calls[0].function %}
{{- '\\n\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
{{- '<|im_end|>' }}
{%- elif message.role == 'tool' %}<|im_start|>ipython

{{ message.content | tojson }}<|im_end|>
{%- else %}<|im_start|>{{ message.role }}

{% if loop.index0 == 0 and tools %}{% for tool in tools %}{{ tool | tojson }}

{% endfor %}{% endif %}{{ message.content }}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""

MISTRAL = """{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.index0 == 0 %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}[TOOL_RESULTS] {"content": {{ message.content | tojson }}}[/TOOL_RESULTS]
{%- elif message.role == 'assistant' and message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if (call.id | default('', true)) | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- ', "id": "' + call.id + '"}' }}
{{- ', ' if not loop.last }}
{%- endfor %}]<|im_end|>
{%- elif message.role == 'assistant' %} {{ message.content }}<|im_end|>
{%- else %}{{ raise_exception('only user, assistant and tool take turns') }}
{%- endif %}
{%- endfor %}"""

MARKED = HERMES.replace(
    """<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>""",
    "CALL",
)
assert MARKED != HERMES
_VALUE = "{{ value if value is string else value | tojson }}"
CODER = MARKED.replace(
    "CALL",
    f"""<tool_call>
<function={{{{ call.function.name }}}}>
{{% for key, value in call.function.arguments.items() %}}<parameter={{{{ key }}}}>
{_VALUE}
</parameter>
{{% endfor %}}</function>
</tool_call>""",
)
"""Qwen3-Coder."""
GLM = MARKED.replace(
    "CALL",
    f"""<tool_call>{{{{ call.function.name }}}}
{{% for key, value in call.function.arguments.items() %}}<arg_key>{{{{ key }}}}</arg_key>
<arg_value>{_VALUE}</arg_value>
{{% endfor %}}</tool_call>""",
)
INVOKE = MARKED.replace(
    "CALL",
    f"""<tools:call>
<invoke name="{{{{ call.function.name }}}}">
{{% for key, value in call.function.arguments.items() %}}<parameter name="{{{{ key }}}}">{_VALUE}</parameter>
{{% endfor %}}</invoke>
</tools:call>""",
)
"""MiniMax-M2."""


def tokenizer_with(template: str | None = CHATML, special: tuple[str, ...] = ()) -> Any:
    """The tests' tokenizer with another chat template, and more special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return tokenizer


def mistral() -> Any:
    return tokenizer_with(MISTRAL, ("[TOOL_CALLS]", "[INST]", "[/INST]"))


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
