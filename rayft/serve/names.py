"""What the names in requests stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rayft.serve.errors import ApiError
from rayft.serve.job import Content

_LISTED = 50
"""Names that the message about an unknown one lists."""


@dataclass(frozen=True)
class Served:
    """What a request's `model` was when the request came."""

    name: str
    """The base, an alias, or a content hash that was asked for as such: what keys allow and metrics count by."""
    content: Content | None
    """None = the bare base."""
    version: int | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class NameCard:
    """One entry of `/v1/models`."""

    id: str
    root: str
    """Where it came from: the base's name, `run:NAME@...`, a folder."""
    parent: str | None
    """The base of an adapter; None for the base itself."""
    created: int
    """Seconds since the epoch."""


class Names(Protocol):
    """Which names there are, and what they stand for at this moment."""

    def resolve(self, model: str, sticky: str | None) -> Served:
        """sticky: requests with the same text stay with one version of an alias that has several.

        Raises ApiError R831 for an unknown name.
        """
        ...

    def cards(self) -> list[NameCard]: ...


class FixedNames:
    """A base and adapters that stay what they are."""

    def __init__(self, base: str, adapters: Mapping[str, Content] | None = None, created: int = 0) -> None:
        self._base, self._adapters, self._created = base, dict(adapters or {}), created

    def resolve(self, model: str, sticky: str | None) -> Served:
        if model == self._base:
            return Served(model, None)
        if model in self._adapters:
            return Served(model, self._adapters[model])
        for content in self._adapters.values():
            if content.hash == model:
                return Served(model, content)
        raise unknown(model, [self._base, *self._adapters])

    def cards(self) -> list[NameCard]:
        adapters = [NameCard(name, content.path, self._base, self._created) for name, content in self._adapters.items()]
        return [NameCard(self._base, self._base, None, self._created), *adapters]


def unknown(model: str, names: Iterable[str]) -> ApiError:
    """The error about a name that stands for nothing."""
    known = list(names)
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    listed = ", ".join(known[:_LISTED])
    return ApiError("R831", f"there is no model {model[:200]!r}; known: {listed}{more}", param="model")
