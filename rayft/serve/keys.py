"""API keys: who may use what, and how much of it.

The file is JSON with the keys' sha256, never the keys. They are drawn at random with 256 bits, so there is nothing to
guess, and a slow hash would only slow down each request.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.types import Scope

from rayft.errors import UsageError
from rayft.serve.errors import ApiError

log = logging.getLogger("rayft.serve")

PREFIX = "rayft-"
_SCOPE = "rayft.key"


class Key(BaseModel):
    """What is known of one key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    admin: bool = False
    """May also load, unload, promote and see what the server does."""
    tenant: str | None = None
    """Whose share of the engines, caches and statistics its requests count to; the key's name by default."""
    adapters: list[str] | None = None
    """Names that it may use, `*` allowed (`team-a-*`); the base is a name too. None = all."""
    requests_per_second: float | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, ge=1)
    """Of prompts and answers together."""
    concurrency: int | None = Field(None, ge=1)
    """Requests at a time."""
    created: str = ""

    def allows(self, name: str) -> bool:
        return self.adapters is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adapters)

    @property
    def owner(self) -> str:
        return self.name if self.tenant is None else self.tenant


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[Key] = []


ANYONE = Key.model_construct(name="", hash="", admin=True)
"""Whoever asks a server without keys."""


@dataclass(frozen=True)
class _Stamp:
    """Changes when the file does."""

    modified: int
    size: int
    inode: int


class Keys:
    """The keys of a file, which is read again when it has changed."""

    def __init__(self, file: str | Path) -> None:
        """Raises UsageError R844 when the file cannot be read."""
        self.file = Path(file)
        self._stamp = self._look()
        self._keys = read(self.file)

    def find(self, key: str) -> Key | None:
        """Takes as long for a key that is nearly right as for any other."""
        self._refresh()
        hash = _hash(key)
        found = None
        for known in self._keys:
            if hmac.compare_digest(known.hash, hash):
                found = known
        return found

    def _refresh(self) -> None:
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._keys, self._stamp = read(self.file), stamp
        except UsageError as error:  # somebody edits it: those that were known stay until it can be read again
            log.warning("%s", error)

    def _look(self) -> _Stamp:
        try:
            found = os.stat(self.file)
        except OSError as error:
            raise UsageError("R844", f"the file of API keys cannot be read: {error}", "rayft keys add") from error
        return _Stamp(found.st_mtime_ns, found.st_size, found.st_ino)


def read(file: Path) -> list[Key]:
    """Raises UsageError R844."""
    try:
        keys = _File.model_validate_json(file.read_bytes()).keys
    except (OSError, ValidationError) as error:
        raise UsageError("R844", f"{file} cannot be read as a file of API keys: {error}", "rayft keys add") from error
    names = [key.name for key in keys]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError("R844", f"{file} holds {', '.join(sorted(twice))} twice")
    return keys


def add(
    file: str | Path,
    name: str,
    *,
    admin: bool = False,
    tenant: str | None = None,
    adapters: Sequence[str] | None = None,
    requests_per_second: float | None = None,
    tokens_per_minute: int | None = None,
    concurrency: int | None = None,
) -> str:
    """Draw a key, note its hash in the file (made if there is none), and return it: nobody can look it up later.

    Raises:
        UsageError: R844 (the file), R845 (the name is in use, or a value is out of range).
    """
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        entry = Key(
            name=name,
            hash=_hash(key),
            admin=admin,
            tenant=tenant,
            adapters=list(adapters) if adapters else None,
            requests_per_second=requests_per_second,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError("R845", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        keys = read(path) if path.exists() else []
        if any(known.name == name for known in keys):
            raise UsageError("R845", f"{path} holds a key named {name} already", f"rayft keys revoke {name}")
        _write(path, [*keys, entry])
    return key


def revoke(file: str | Path, name: str) -> Key:
    """Take a key out of the file; servers refuse it from the next request on. Raises UsageError R844, R845."""
    path = Path(file)
    with _locked(path):
        keys = read(path)
        found = [key for key in keys if key.name == name]
        if not found:
            raise UsageError("R845", f"{path} holds no key named {name}; it holds: {_names(keys)}")
        _write(path, [key for key in keys if key.name != name])
    return found[0]


def authenticate(keys: Keys | None, scope: Scope) -> None:
    """Note in the scope who asks. Raises ApiError R832."""
    if keys is None:
        scope[_SCOPE] = ANYONE
        return
    given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    scheme, _, key = given.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ApiError("R832", "this server asks for an API key", "send the header Authorization: Bearer KEY")
    found = keys.find(key.strip())
    if found is None:
        raise ApiError("R832", "the API key is unknown or was revoked")
    scope[_SCOPE] = found


def caller(request: Request) -> Key:
    """Who asks."""
    key = request.scope.get(_SCOPE)
    assert isinstance(key, Key), "the guard has let nobody in"
    return key


def admin(request: Request) -> str | None:
    """A dependency of routes that only admin keys may use; the key's name, None where there are no keys.

    Raises ApiError R833.
    """
    key = caller(request)
    if not key.admin:
        raise ApiError("R833", "this route needs an admin key", "rayft keys add --admin NAME")
    return key.name or None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from rayft.runs.storage import lock

    held = lock(f"{path}.lock", timeout=10)
    try:
        yield
    finally:
        held.release()


def _write(path: Path, keys: list[Key]) -> None:
    from rayft.runs.storage import write_atomic

    write_atomic(path, _File(keys=keys).model_dump_json(indent=1, exclude_none=True) + "\n")
    path.chmod(0o600)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def _names(keys: Sequence[Key]) -> str:
    return ", ".join(key.name for key in keys) or "none"
