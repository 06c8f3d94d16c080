"""Where adapters may be loaded from while a server runs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from rayft.errors import UsageError
from rayft.runs.reference import resolve
from rayft.runs.shelf import KEPT

_HUB = re.compile(r"hf://(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?")


class Roots:
    """The places that ``serve.roots`` lists, and the storage of the runs.

    A source outside of them is refused before anything looks whether it exists. Symbolic links and `..` are followed
    first, for the folder and for every file that would be copied out of it.
    """

    def __init__(self, roots: Sequence[str], storage: str) -> None:
        """roots: folders, buckets (`s3://bucket/prefix`) and Hub owners or adapters (`hf://owner[/name]`)."""
        self.storage = storage
        self._hub = [root.rstrip("/") for root in roots if root.startswith("hf://")]
        places = [storage, *(root for root in roots if not root.startswith("hf://"))]
        self._buckets = [place for place in places if _is_bucket(place)]
        self._folders = [_real(place) for place in places if not _is_bucket(place)]

    def admit(self, source: str) -> str:
        """What to register for a source: a `run:` reference, a folder or a bucket. A Hub adapter is fetched first.

        Blocks while it reads files. Raises UsageError: R434 (outside), R435 (not on the Hub, or it cannot be reached),
        R411, R414.
        """
        if source.startswith("run:"):
            return source
        if source.startswith("hf://"):
            return self._from_hub(source)
        if _is_bucket(source):
            return self._in_bucket(source)
        return self._in_folder(source)

    def _in_folder(self, source: str) -> str:
        if "\0" in source or not self._holds(_real(source)):
            raise self._outside(source)
        folder = resolve(source, self.storage).path
        if not all(self._holds(_real(path)) for path in (folder, *(os.path.join(folder, name) for name in KEPT))):
            raise self._outside(source)
        return folder

    def _in_bucket(self, source: str) -> str:
        bare, mark, query = source.partition("?")
        # What follows the question mark may name another server, so only the root itself says it.
        if mark or "%" in bare or "\0" in bare or ".." in bare.split("/") or "." in bare.split("/"):
            raise self._outside(source)
        for root in self._buckets:
            prefix, mark, query = root.partition("?")
            if f"{bare.rstrip('/')}/".startswith(f"{prefix.rstrip('/')}/"):
                return f"{bare.rstrip('/')}{mark}{query}"
        raise self._outside(source)

    def _from_hub(self, source: str) -> str:
        match = _HUB.fullmatch(source)
        if match is None or ".." in source or not any(f"hf://{match['id']}/".startswith(f"{r}/") for r in self._hub):
            raise self._outside(source)
        from huggingface_hub import snapshot_download

        try:
            return str(snapshot_download(match["id"], revision=match["revision"], allow_patterns=list(KEPT)))
        except (OSError, ValueError, RuntimeError) as problem:  # unknown, gated, offline, no connection
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise UsageError(
                "R435", f"{source} cannot be fetched from the Hub: {reason}", "is HF_TOKEN set?"
            ) from problem

    def _holds(self, path: str) -> bool:
        return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in self._folders)

    def _outside(self, source: str) -> UsageError:
        return UsageError(
            "R434",
            f"{source[:200]!r} is not below a place that adapters may be loaded from",
            "run:NAME works always; other places are listed in serve.roots",
        )


def _is_bucket(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


def _real(path: str) -> str:
    """Absolute, without symbolic links and `..`."""
    return os.path.realpath(os.path.expanduser(path.removeprefix("file://")))
