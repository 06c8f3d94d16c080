"""Every key of the recipe: its dotted path, what it may hold, its default and its documentation.

Error messages, the generated reference and the search for misspelt keys all read the pydantic models through this file.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rayft.config.recipe import Recipe
from rayft.config.section import Section

Part = str | int

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything", type(None): "null"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    path: str
    """Dotted; an item of a list is written `[]`, of a mapping `*`."""
    allowed: str
    default: str
    documentation: str


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def sections(root: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The sections of a recipe with the dotted prefix of their keys, parents first, each class once."""
    seen: set[type[Section]] = set()

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
        if section in seen:
            return
        seen.add(section)
        yield prefix, section
        for name, field in section.model_fields.items():
            path = f"{prefix}.{name}" if prefix else name
            for member in members(field.annotation):
                if is_section(member):
                    yield from walk(member, path)
                elif get_origin(member) is list and is_section(get_args(member)[0]):
                    yield from walk(get_args(member)[0], f"{path}[]")
                elif get_origin(member) is dict and is_section(get_args(member)[1]):
                    yield from walk(get_args(member)[1], f"{path}.*")

    return walk(root, prefix)


def keys() -> Iterator[Key]:
    """Every key that is not itself a section."""
    for prefix, section in sections():
        for name, field in section.model_fields.items():
            if all(is_section(member) for member in members(field.annotation) if member is not type(None)):
                continue
            path = f"{prefix}.{name}" if prefix else name
            yield Key(path, allowed(field), default(field), field.description or "")


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Section):
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def allowed(field: FieldInfo) -> str:
    """What a key may hold, in words: `whole number >= 1 or null`."""
    bounds = [
        f"{sign} {getattr(item, bound):g}"
        for item in field.metadata
        for bound, sign in _BOUNDS.items()
        if getattr(item, bound, None) is not None
    ]
    patterns = [item.pattern for item in field.metadata if getattr(item, "pattern", None)]
    words = []
    for member in members(field.annotation):
        word = describe(member)
        if member in (int, float) and bounds:
            word = f"{word} {' and '.join(bounds)}"
        if member is str and patterns:
            word = f"{word} that matches {patterns[0]}"
        words.append(word)
    return _join(words)


def describe(annotation: Any) -> str:
    """A type in words."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if is_section(annotation):
        return f"section ({', '.join(annotation.model_fields)})"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin is tuple:
        return "[min, max]"
    if origin is list:
        return f"list of {_join([describe(member) for member in members(arguments[0])])}"
    return "mapping"


def exists(parts: Sequence[Part]) -> bool:
    """Whether a recipe can hold a value at this path; indices of lists are whole numbers."""
    annotation: Any = Recipe
    for part in parts:
        if not any(_holds(member, part) for member in members(annotation)):
            return False
        annotation = _below(annotation, part)
    return True


def _holds(annotation: Any, part: Part) -> bool:
    if is_section(annotation):
        return part in annotation.model_fields
    if get_origin(annotation) in (list, tuple):
        return isinstance(part, int)
    return annotation is Any or get_origin(annotation) is dict


def section_at(parts: Sequence[Part]) -> type[Section] | None:
    """The section that holds the keys below this path, if there is one."""
    annotation = _annotation_at(parts)
    return next((member for member in members(annotation) if is_section(member)), None)


def allowed_at(parts: Sequence[Part]) -> str:
    """What the value at this path may hold, in words."""
    section = section_at(parts[:-1])
    if section is not None and parts[-1] in section.model_fields:
        return allowed(section.model_fields[str(parts[-1])])
    return _join([describe(member) for member in members(_annotation_at(parts))])


def _annotation_at(parts: Sequence[Part]) -> Any:
    annotation: Any = Recipe
    for part in parts:
        annotation = _below(annotation, part)
    return annotation


def _below(annotation: Any, part: Part) -> Any:
    """The annotation of one item or field; Any below free mappings."""
    for member in members(annotation):
        if isinstance(part, int) and get_origin(member) in (list, tuple):
            return get_args(member)[0]
        if is_section(member) and part in member.model_fields:
            return member.model_fields[part].annotation
        if get_origin(member) is dict:
            return get_args(member)[1]
    return Any


def _join(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"
