"""Adapters that come, change and go while a server runs: first to the replicas, then under their name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rayft.errors import RayftError, UsageError
from rayft.runs import versions
from rayft.runs.registry import Alias, Registry, Version
from rayft.serve.backend import Backend
from rayft.serve.experiment import Experiments
from rayft.serve.job import Content
from rayft.serve.roots import Roots

log = logging.getLogger("rayft.serve")


def content(version: Version) -> Content:
    return Content(version.hash, version.path)


@dataclass(frozen=True)
class Terms:
    """How a version is to answer; None leaves a thing as it is."""

    promote: bool | None = None
    """By default where nothing is served under this name yet and no weight is given."""
    weight: float | None = None
    """Its share of the requests, above 0 and at most 1; the others keep their proportions."""
    pin: bool | None = None
    """Of the alias, and so is the strength."""
    strength: float | None = None


class Lifecycle:
    """Changes of the registry that the replicas hear of. Files are read and written in threads.

    A version gets requests only after every replica has loaded it, so an adapter that is broken or of another base
    never answers. ``who`` is noted in the history.
    """

    def __init__(self, registry: Registry, backend: Backend, roots: Roots, experiments: Experiments) -> None:
        self.registry, self.backend, self.roots, self.experiments = registry, backend, roots, experiments
        self._pinned: dict[str, Content] = {}
        """What this process has pinned on the replicas, by hash."""

    async def add(
        self,
        name: str,
        source: str,
        terms: Terms | None = None,
        *,
        note: str = "",
        allow_same: bool = False,
        who: str | None = None,
    ) -> tuple[Alias, Version]:
        """Register an adapter and load it, then let it answer as ``terms`` say.

        source: `run:NAME[@...]`, a folder, a bucket or `hf://OWNER/NAME`. allow_same: take the version that has this
        content already.

        Raises UsageError: R427, R434 to R436, what `Registry.register` raises, and what `Backend.load` raises; then the
        name has no new version.
        """
        if name == (await self.backend.card()).name:
            raise UsageError("R436", f"{name!r} is the name of the base model", "choose another one")
        registry = self.registry.by(who)
        before = self.registry.aliases().get(name)
        place = await asyncio.to_thread(self.roots.admit, source)
        version = await asyncio.to_thread(
            registry.register,
            name,
            place,
            storage=self.roots.storage,
            note=note,
            source=source,
            allow_same=allow_same,
        )
        try:
            await self.backend.load(content(version))
            alias = await self.serve(name, version.number, terms, who)
        except BaseException:
            if before is None or all(version.number != known.number for known in before.versions):
                await asyncio.to_thread(self._withdraw, registry, name, version.number)
            raise
        return alias, version

    async def serve(self, name: str, number: int, terms: Terms | None = None, who: str | None = None) -> Alias:
        """Let a version that is registered answer as ``terms`` say.

        Raises UsageError: R421, R423, R427, and what `Backend.load` raises.
        """
        terms = terms or Terms()
        alias = self.registry.alias(name)
        alias.version(number)
        if terms.weight is not None and not 0 < terms.weight <= 1:
            raise UsageError("R427", f"the share {terms.weight!r} is not above 0 and at most 1")
        if terms.strength is not None:
            alias = await asyncio.to_thread(self.registry.by(who).strengthen, name, terms.strength)
        if terms.pin is not None:
            alias = await self.pin(name, terms.pin, who)
        if terms.promote or (terms.promote is None and terms.weight is None and not alias.weights):
            return await self.promote(name, number, who)
        if terms.weight is not None:
            return await self.weigh(name, with_share(alias, number, terms.weight), who)
        return alias

    async def promote(self, name: str, number: int, who: str | None = None) -> Alias:
        """Raises UsageError: R421, R423, and what `Backend.load` raises."""
        await self._bring(self.registry.alias(name), [number])
        alias = await asyncio.to_thread(self.registry.by(who).promote, name, number)
        await self.sync()
        return alias

    async def weigh(self, name: str, weights: Mapping[int, float], who: str | None = None) -> Alias:
        """Raises UsageError: R421, R423, R427, and what `Backend.load` raises."""
        before = self.registry.alias(name)
        await self._bring(before, versions.weighed(before, weights).weights.keys() - before.weights.keys())
        alias = await asyncio.to_thread(self.registry.by(who).weigh, name, weights)
        await self.sync()
        return alias

    async def rollback(self, name: str, who: str | None = None) -> Alias:
        """At once: nothing is loaded before it. Raises UsageError: R421, R429."""
        alias = await asyncio.to_thread(self.registry.by(who).rollback, name)
        await self.sync()
        return alias

    async def pin(self, name: str, pinned: bool, who: str | None = None) -> Alias:
        """Raises UsageError: R421, R816 (no slot is free)."""
        if pinned:
            before = self.registry.alias(name)
            await self._bring(replace(before, pinned=True), before.weights)
        alias = await asyncio.to_thread(self.registry.by(who).pin, name, pinned)
        await self.sync()
        return alias

    async def remove(self, name: str, number: int | None = None, who: str | None = None) -> None:
        """Forget a name, or one of its versions; requests in flight end on it, then the replicas free it.

        Raises UsageError: R421, R423, R428.
        """
        before = self.registry.alias(name)
        await asyncio.to_thread(self.registry.by(who).remove, name, number)
        if number is None:
            self.experiments.forget(name)
        for hash in {version.hash for version in before.versions} - self._known_hashes():
            self._pinned.pop(hash, None)
            await self.backend.unload(hash)
        await self.sync()

    async def sync(self, everything: bool = False) -> None:
        """Pin on the replicas what the registry says, whoever changed it. Problems are logged.

        everything: also what this process has pinned before, for replicas that have started since.
        """
        aliases = self.registry.aliases().values()
        wanted = {hash: content for alias in aliases for hash, content in pinned_contents(alias).items()}
        known = self._known_hashes()
        for hash, pinned in {**self._pinned, **wanted}.items():
            try:
                if hash not in known:
                    await self.backend.unload(hash)
                elif hash not in wanted:
                    await self.backend.load(pinned, False)
                elif everything or hash not in self._pinned:
                    await self.backend.load(pinned, True)
            except RayftError as problem:
                log.warning("the adapter %s is not pinned as the registry says: %s", hash[:12], problem)
        self._pinned = wanted

    async def watch(self, seconds: float = 1.0) -> None:
        """`sync` whenever somebody has changed the registry; until it is cancelled."""
        seen: object = None
        while True:
            try:
                if (aliases := self.registry.aliases()) is not seen:
                    await self.sync(everything=seen is None)
                    seen = aliases
            except Exception as problem:  # a registry that is damaged for a while, replicas that start again
                log.warning("the registry cannot be followed: %s", problem)
            await asyncio.sleep(seconds)

    async def _bring(self, alias: Alias, numbers: Iterable[int]) -> None:
        """Versions to every replica; pinned, where the alias is."""
        for version in [alias.version(number) for number in numbers]:
            await self.backend.load(content(version), True if alias.pinned else None)
            if alias.pinned:
                self._pinned[version.hash] = content(version)

    def _known_hashes(self) -> set[str]:
        return {version.hash for alias in self.registry.aliases().values() for version in alias.versions}

    def _withdraw(self, registry: Registry, name: str, number: int) -> None:
        """Forget a version that could not be loaded, and its name if it has no other."""
        with contextlib.suppress(UsageError):  # somebody else gave it requests, or removed it
            registry.remove(name, number)
            if not registry.alias(name).versions:
                registry.remove(name)


def with_share(alias: Alias, number: int, share: float) -> dict[int, float]:
    """Weights that give one version a share, above 0 and at most 1; the others keep their proportions."""
    others = {n: weight for n, weight in alias.weights.items() if n != number}
    total = sum(others.values())
    if not total:
        return {number: share}
    return {number: share} | {n: weight / total * (1 - share) for n, weight in others.items()}


def pinned_contents(alias: Alias) -> dict[str, Content]:
    """Content by hash of what the replicas keep for an alias."""
    if not alias.pinned:
        return {}
    return {version.hash: content(version) for version in alias.versions if version.number in alias.weights}
