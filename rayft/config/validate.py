"""From plain data to a `Recipe`, or one message: every problem with its key, what was given and what is allowed."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rayft.config.document import Document
from rayft.config.keys import Part, allowed_at, keys, section_at
from rayft.config.recipe import Recipe
from rayft.config.synonyms import synonym
from rayft.errors import UsageError

_EXAMPLES = {"model.base": "model.base=smollm2-135m-instruct", "data.train": "data.train=my.jsonl"}


@dataclass(frozen=True)
class Problem:
    """One thing to correct. `id` names its section in docs/errors/recipe.md."""

    id: str
    text: str


def refuse(problems: list[Problem]) -> None:
    """Raise all problems as one UsageError; nothing happens when there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise UsageError(problems[0].id, problems[0].text)
    lines = [f"  {problem.id}: {problem.text}" for problem in problems]
    raise UsageError("R100", "\n".join([f"the recipe has {len(problems)} problems", *lines]))


def validate(document: Document) -> Recipe:
    """The recipe in a document.

    Raises UsageError R104 (unknown key), R105 (wrong type or value), R106 (missing key), or R100 with all of them.
    """
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as error:
        refuse(_problems(error, document))
        raise


def _problems(error: ValidationError, document: Document) -> list[Problem]:
    """One problem per key: pydantic reports every member of a union apart, and names the members in its locations."""
    found: dict[tuple[Part, ...], Problem] = {}
    for item in error.errors(include_url=False):
        parts = _path_in(document.data, item["loc"], missing=item["type"] == "missing")
        if parts in found and item["type"] != "value_error":
            continue
        found[parts] = _problem(parts, item["type"], item, document)
    # A union such as `section or list` complains at its own level too when only a key inside of it is wrong.
    inner = [parts for parts in found if not any(parts != other and other[: len(parts)] == parts for other in found)]
    problems = [found[parts] for parts in inner]
    return sorted(problems, key=lambda problem: problem.id == "R106")


def _path_in(node: Any, location: tuple[Part, ...], missing: bool) -> tuple[Part, ...]:
    """The part of a pydantic location that lies in the data, without the names of union members."""
    parts: list[Part] = []
    for part in location[:-1] if missing else location:
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            parts.append(part)
            node = node[part]
    return (*parts, location[-1]) if missing else tuple(parts)


def _problem(parts: tuple[Part, ...], kind: str, item: Any, document: Document) -> Problem:
    path = ".".join(map(str, parts))
    place = document.place(path)
    where = f"{path} ({place})" if place else path
    if kind == "missing":
        path = {"model": "model.base", "data": "data.train"}.get(path, path)
        return Problem("R106", f"{path} is required; write for example {_EXAMPLES.get(path, f'{path}=...')}")
    if kind == "extra_forbidden":
        return Problem("R104", f"{where}: unknown key, given {given(item['input'])}. {advice(parts)}")
    if kind == "value_error":
        return Problem("R105", f"{where}: given {given(item['input'])}; {item['ctx']['error']}")
    return Problem("R105", f"{where}: given {given(_value(document.data, parts))}, allowed: {allowed_at(parts)}")


def _value(data: Any, parts: tuple[Part, ...]) -> Any:
    for part in parts:
        data = data[part]
    return data


def given(value: Any) -> str:
    """A value as the user sees it in YAML, shortened. Text says that it is text: `"1e-4"` is not a number."""
    text = json.dumps(value, default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} (text)" if isinstance(value, str) else text


def advice(parts: tuple[Part, ...]) -> str:
    """What an unknown key was meant to be: another library's name, a misspelling, or a key of another section."""
    path = ".".join(map(str, parts))
    name = str(parts[-1])
    entry = synonym(path)
    if entry is not None:
        return entry.answer
    every = [key.path for key in keys()] + [*Recipe.model_fields]
    above = ".".join("[]" if isinstance(part, int) else part for part in parts[:-1]).replace(".[]", "[]")
    same_name = [known for known in every if known.rpartition(".")[2] == name]
    if same_name:
        return f"It stands elsewhere: {' or '.join(same_name[:3])}"
    section = section_at(parts[:-1])
    siblings = list(section.model_fields) if section else []
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if near:
        return f"Did you mean {f'{above}.{near[0]}' if above else near[0]}?"
    last = {known.rpartition(".")[2]: known for known in reversed(every)}
    near = difflib.get_close_matches(name, list(last), n=1, cutoff=0.8)
    if near:
        return f"Did you mean {last[near[0]]}?"
    return f"Allowed {'in ' + above if above else 'here'}: {', '.join(siblings)}"
