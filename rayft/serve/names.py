"""What the names in requests stand for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rayft.runs.versions import Alias, Version
from rayft.serve.errors import ApiError
from rayft.serve.job import Content
from rayft.serve.rollout import choose

if TYPE_CHECKING:
    from rayft.runs.registry import Registry

_HASH = re.compile(r"[0-9a-f]{64}")
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

        Raises ApiError R831 for an unknown name. Takes microseconds.
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


class RegistryNames:
    """The base, and the aliases of a registry as they are at this moment.

    `name` is one of its versions, drawn by weight or by the sticky key; `name@3`, `name@production` and `name@staging`
    are that version; a content hash, all 64 digits of it, is that content under whatever name it is registered.
    """

    def __init__(self, registry: Registry, base: str, created: int | None = None) -> None:
        """created: of the base, in seconds since the epoch; now by default."""
        self._registry, self._base = registry, base
        self._created = int(time.time()) if created is None else created

    def resolve(self, model: str, sticky: str | None) -> Served:
        """See `Names.resolve`. Raises UsageError R432 too, for a name of which no version is served."""
        if model == self._base:
            return Served(model, None)
        aliases = self._registry.aliases()
        name, at, wanted = model.partition("@")
        alias = aliases.get(name)
        if alias is not None:
            version = _version(alias, wanted) if at else choose(alias, sticky)
            if version is not None:
                return _served(name, version, alias.strength)
        elif _HASH.fullmatch(model):
            for alias in aliases.values():
                for version in alias.versions:
                    if version.hash == model:
                        return _served(model, version, 1.0)
        raise unknown(model, [self._base, *aliases])

    def cards(self) -> list[NameCard]:
        cards = [NameCard(self._base, self._base, None, self._created)]
        for name, alias in self._registry.aliases().items():
            serving = [version for version in alias.versions if version.number in alias.weights]
            if serving:
                cards.append(NameCard(name, serving[-1].source, self._base, int(serving[-1].created)))
        return cards


def _version(alias: Alias, wanted: str) -> Version | None:
    """The version of this number, or the newest one in this stage."""
    found = [version for version in alias.versions if wanted in (str(version.number), version.stage)]
    return found[-1] if found and wanted != "none" else None


def _served(name: str, version: Version, strength: float) -> Served:
    return Served(name, Content(version.hash, version.path), version.number, strength)
