"""The lines of an offline run: prompts that are read, answers that are written, and which of them belong together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from rayft.errors import UsageError
from rayft.inference.grammar import Grammar, GrammarKind
from rayft.inference.request import SamplingParams
from rayft.runs.storage import Location
from rayft.serve.job import Content, Conversation, Job

ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"logprobs", "top_logprobs"}
FIELDS = {"id", "prompt", "messages", "tools", "tool_choice", "adapter", "grammar", "strength", "metadata"}


@dataclass(frozen=True)
class Item:
    """One line that wants an answer. Plain data."""

    id: str | int
    key: str
    """Of all that the answer depends on; an answer with the same id and key need not be computed again."""
    job: Job
    adapter: str | None
    """Name of the adapter; None = the bare base."""
    metadata: Any = None
    """Goes into the answer's line as it is."""


def read_items(
    file: Location, defaults: SamplingParams, adapters: Mapping[str, Content], model: str
) -> tuple[Item, ...]:
    """adapters: by name, the first of which answers where a line names none. model: hash of all else that decides.

    Raises:
        UsageError: R870 for a line that cannot be answered, R871 for an input that cannot be read or an id that comes
            twice.
    """
    try:
        lines = file.read().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("R871", f"{file} cannot be read: {error}") from error
    items: dict[str | int, Item] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line), number, defaults, adapters, model)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError("R870", f"{file}, line {number}: {error}") from error
        except UsageError as error:
            raise UsageError("R870", f"{file}, line {number}: {error.message}", error.hint) from error
        if item.id in items:
            raise UsageError("R871", f"{file}, line {number}: the id {item.id!r} comes twice")
        items[item.id] = item
    return tuple(items.values())


def _item(line: Any, number: int, defaults: SamplingParams, adapters: Mapping[str, Content], model: str) -> Item:
    if not isinstance(line, dict):
        raise ValueError("a line is a JSON object")
    given: dict[str, Any] = {str(ALIASES.get(name, name)): value for name, value in line.items()}
    if unknown := sorted(given.keys() - SAMPLING - FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}; what is not for us belongs into `metadata`")
    if ("prompt" in given) == ("messages" in given):
        raise ValueError("a line has a prompt or messages")
    id = given.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"an id is a text or a whole number, not {id!r}")
    adapter = given.get("adapter", next(iter(adapters), None))
    if adapter is not None and adapter not in adapters:
        raise ValueError(f"there is no adapter {adapter!r}; there are: {', '.join(adapters) or 'none'}")
    content = adapters[adapter] if adapter is not None else None
    job = Job(
        id=f"line-{number}",
        prompt=_prompt(given),
        sampling=_sampling(given, defaults),
        adapter=content,
        strength=float(given.get("strength", 1.0)),
        stream=False,
        grammar=_grammar(given.get("grammar")),
    )
    decisive = {name: value for name, value in given.items() if name not in ("id", "metadata", "adapter")}
    facts = [decisive, content.hash if content else None, repr(job.sampling), model]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Item(id, key, job, adapter, given.get("metadata"))


def _prompt(given: Mapping[str, Any]) -> Conversation | str | tuple[int, ...]:
    if "messages" in given:
        messages, tools = given["messages"], given.get("tools") or ()
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages are a list of objects with role and content")
        return Conversation(tuple(messages), tuple(tools), given.get("tool_choice") or "auto")
    prompt = given["prompt"]
    if isinstance(prompt, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in prompt):
        return tuple(prompt)
    if not isinstance(prompt, str):
        raise ValueError("a prompt is a text or a list of token ids")
    return prompt


def _sampling(given: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """Raises UsageError R811, ValueError."""
    fields = {name: value for name, value in given.items() if name in SAMPLING and value is not None}
    for name, value in fields.items():
        default = getattr(SamplingParams(), name)
        numbers = (int, float) if isinstance(default, float) else (int,)
        if name in ("stop", "stop_token_ids"):
            fields[name] = (value,) if isinstance(value, str) else tuple(value)
        elif name == "logit_bias":
            fields[name] = {int(token): float(bias) for token, bias in dict(value).items()}
        elif isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, (bool, *numbers)):
            raise ValueError(f"{name} is {type(default or 0).__name__}, not {value!r}")
    return dataclasses.replace(defaults, **fields)


def _grammar(given: Any) -> Grammar | None:
    """`{"kind": ..., "value": ...}`; the value may be written as JSON instead of a text of JSON."""
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("kind") not in get_args(GrammarKind):
        raise ValueError(f'a grammar is {{"kind": ..., "value": ...}} of kind {", ".join(get_args(GrammarKind))}')
    value = given.get("value", "")
    return Grammar(given["kind"], value if isinstance(value, str) else json.dumps(value))
