"""The registry: names, their versions and who answers, in one folder that servers and people share.

``registry.json`` holds all of it and ``adapters/`` a copy of every version, so that a version stays what it was when
the run is gone or its folder changes. Writers take turns under a file lock; readers take no lock, since the file is
replaced at once.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rayft.errors import UsageError
from rayft.runs import versions
from rayft.runs.book import Book
from rayft.runs.manifest import step_of
from rayft.runs.reference import AdapterRef, resolve
from rayft.runs.shelf import Draft, Shelf
from rayft.runs.storage import locate, lock, write_atomic
from rayft.runs.versions import STAGES, Alias, Event, Split, Stage, Version

__all__ = ["Alias", "Event", "Registry", "Split", "Stage", "Version", "check_name"]

FILE = "registry.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)*")
_LONGEST_NAME = 200
_HEAD = 128
"""First bytes of the file, which hold a number drawn for every writing."""
_WAIT = 60.0
"""Seconds that a writer waits for others."""


class Registry:
    """A folder of names and versions. Safe for several threads and processes, also on several machines."""

    def __init__(self, folder: str | os.PathLike[str], who: str | None = None) -> None:
        """Nothing is made before the first writing. who: noted beside what is changed.

        Raises UsageError R405 for a bucket.
        """
        if "://" in os.fspath(folder) and not os.fspath(folder).startswith("file://"):
            raise UsageError(
                "R405", f"the registry {folder} is a bucket, and its lock needs a file system", "set serve.registry"
            )
        self.folder = locate(folder).local
        self.who = who
        self._file = self.folder / FILE
        self._shelf = Shelf(self.folder / "adapters")
        self._book = Book(self._shelf.folder)
        self._read: tuple[object, Mapping[str, Alias]] = (None, {})

    def by(self, who: str | None) -> Registry:
        """The same registry; changes made through it are noted as this one's."""
        other = copy.copy(self)
        other.who = who
        return other

    # --- reading ------------------------------------------------------------------------------------------------------

    def aliases(self) -> Mapping[str, Alias]:
        """All names. The file is parsed again only when it has changed: a call takes microseconds.

        Raises UsageError R420 for a file that is damaged, or of a newer rayft.
        """
        try:
            file = os.open(self._file, os.O_RDONLY)
        except FileNotFoundError:
            return {}
        try:
            stat = os.fstat(file)
            head = os.read(file, _HEAD)
            state = (head, stat.st_size, stat.st_mtime_ns, stat.st_ino)
            known = self._read
            if state != known[0]:
                with open(file, "rb", closefd=False) as stream:
                    known = self._read = (state, self._parsed(head + stream.read()))
            return known[1]  # not `self._read`, into which another thread may have put what it read before
        finally:
            os.close(file)

    def alias(self, name: str) -> Alias:
        """Raises UsageError: R421 with the nearest names, R420."""
        return _known(self.aliases(), name)

    # --- changing -----------------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        ref_or_folder: str | os.PathLike[str],
        *,
        storage: str | None = None,
        stage: Stage = "none",
        note: str = "",
        allow_same: bool = False,
        source: str | None = None,
    ) -> Version:
        """Copy an adapter in, as the next version of a name; a name that is new is made.

        ref_or_folder: `run:NAME[@...]`, looked for in ``storage`` first, a folder or a bucket. stage: ``production``
        promotes the version too; in any other stage it does not answer yet. allow_same: return the version of this
        name that has this content already. source: what to note as its origin instead of ``ref_or_folder``.

        Raises UsageError: R422 (name), R424 (there already), R425 (no LoRA adapter), R426 (damaged), R431 (stage), R406
        (others write for a minute), R401 (the folder cannot be written), and what `resolve` raises.
        """
        check_name(name)
        if stage not in STAGES:
            raise UsageError("R431", f"{stage!r} is no stage", f"one of {', '.join(STAGES)}")
        try:
            found = resolve(os.fspath(ref_or_folder), storage)
        except OSError as problem:  # a bucket that does not answer
            raise UsageError("R426", f"{ref_or_folder} cannot be read: {problem}") from problem
        if found.kind != "adapter":
            raise UsageError("R425", f"{ref_or_folder} is a whole model, not an adapter", "serve it as the base")
        self._check_folder()
        with self._problems(), self._shelf.draft(locate(found.path)) as draft, self._writing() as aliases:
            alias = aliases.get(name) or Alias(name, salt=secrets.token_hex(8))
            same = next((version for version in alias.versions if Path(version.path).name == draft.key), None)
            if same is None:
                version = _version(alias, draft, found, source or os.fspath(ref_or_folder), stage, note)
                alias = versions.registered(alias, replace(version, path=str(self._shelf.publish(draft))), self.who)
            elif not allow_same:
                raise UsageError(
                    "R424",
                    f"{ref_or_folder} has the content of version {same.number} of {name!r}",
                    "promote that version; the same adapter is not registered twice",
                )
            number = alias.registered if same is None else same.number
            aliases[name] = versions.promoted(alias, number, self.who) if stage == "production" else alias
            return aliases[name].version(number)

    def promote(self, name: str, version: int) -> Alias:
        """Put a version into production: it gets every request, and the one before it is archived.

        Raises UsageError: R421, R423.
        """
        return self._change(name, lambda alias: versions.promoted(alias, version, self.who))

    def rollback(self, name: str) -> Alias:
        """Take back the last `promote` or `weigh`: stages and weights are as before it.

        Raises UsageError: R421, R429.
        """
        return self._change(name, lambda alias: versions.rolled_back(alias, self.who))

    def weigh(self, name: str, weights: Mapping[int, float]) -> Alias:
        """Split the requests: ``{version: weight}``, weights in any unit; versions that are not named get none.

        Raises UsageError: R421, R423, R427.
        """
        return self._change(name, lambda alias: versions.weighed(alias, weights, self.who))

    def pin(self, name: str, pinned: bool) -> Alias:
        """Raises UsageError R421."""
        return self._change(name, lambda alias: versions.pinned(alias, pinned, self.who))

    def strengthen(self, name: str, strength: float) -> Alias:
        """Set the factor on what the adapter adds to the base. Raises UsageError: R421, R427."""
        return self._change(name, lambda alias: versions.strengthened(alias, strength, self.who))

    def remove(self, name: str, version: int | None = None) -> None:
        """Forget a name, or one version that gets no requests; a copy goes when no other version has its content.

        Raises UsageError: R421, R423, R428.
        """
        with self._problems(), self._writing(free=True) as aliases:
            alias = _known(aliases, name)
            if version is None:
                del aliases[name]
            else:
                aliases[name] = versions.removed(alias, version, self.who)

    def _change(self, name: str, change: Callable[[Alias], Alias]) -> Alias:
        with self._problems(), self._writing() as aliases:
            aliases[name] = change(_known(aliases, name))
            return aliases[name]

    # --- the file -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, free: bool = False) -> Iterator[dict[str, Alias]]:
        """The aliases as nobody else changes them meanwhile; what is in the mapping at the end is written.

        free: then delete the copies that no version uses.
        """
        self._check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        held = lock(self.folder / ".lock", timeout=_WAIT)
        try:
            for torn in self.folder.glob(f".{FILE}.*"):  # of a writer that was killed
                torn.unlink()
            before = self.aliases()
            aliases = dict(before)
            yield aliases
            if aliases != before:
                write_atomic(self._file, self._book.write(aliases))
            if free and self._shelf.folder.is_dir():
                self._shelf.free({Path(v.path).name for alias in aliases.values() for v in alias.versions})
        finally:
            held.release()

    def _parsed(self, data: bytes) -> Mapping[str, Alias]:
        try:
            return self._book.read(data)
        except ValueError as problem:
            raise UsageError(
                "R420", f"{self._file} cannot be read: {problem}", "restore it from a copy; nothing was changed in it"
            ) from problem

    def _check_folder(self) -> None:
        if (self.folder / "run.json").exists():
            raise UsageError("R430", f"{self.folder} is a run, not a registry", "set serve.registry to another folder")

    @contextmanager
    def _problems(self) -> Iterator[None]:
        """What the file system refuses is one clear message."""
        try:
            yield
        except OSError as problem:
            raise UsageError(
                "R401", f"the registry {self.folder} cannot be written: {problem}", "set serve.registry"
            ) from problem


def check_name(name: str) -> None:
    """Raises UsageError R422 for what may not be the name of an alias."""
    if not _NAME.fullmatch(name) or ".." in name or len(name) > _LONGEST_NAME:
        raise UsageError(
            "R422",
            f"{name[:_LONGEST_NAME]!r} cannot be the name of an adapter",
            "letters, digits and . _ : - in parts that begin with a letter or digit, joined by /",
        )


def _known(aliases: Mapping[str, Alias], name: str) -> Alias:
    if name in aliases:
        return aliases[name]
    near = difflib.get_close_matches(name, aliases, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`rayft registry list` names those there are"
    raise UsageError("R421", f"there is no adapter {name!r} in the registry", hint)


def _version(alias: Alias, draft: Draft, found: AdapterRef, source: str, stage: Stage, note: str) -> Version:
    """The next version of an alias, from what its copy holds and where it came from."""
    place = locate(found.path)
    checkpoint = next((folder for folder in (place, place.parent) if folder.parent.name == "checkpoints"), None)
    return Version(
        number=alias.registered + 1,
        hash=draft.hash,
        path="",
        base_hash=found.base_hash or draft.base_hash,
        base_name=draft.base_name,
        source=source,
        run=locate(found.run).name if found.run else None,
        step=step_of(checkpoint) if checkpoint and found.run else None,
        rank=draft.rank,
        size=draft.size,
        created=time.time(),
        stage="none" if stage == "production" else stage,
        note=note,
    )


def default_folder(storage: str, registry: str | None = None) -> str:
    """The registry of a recipe: ``serve.registry``, or ``registry`` in the storage of its runs."""
    return registry or str(locate(storage) / "registry")
