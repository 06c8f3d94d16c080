"""Which version of an alias answers a request."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from rayft.errors import UsageError
from rayft.runs.versions import Alias, Version


def choose(alias: Alias, sticky_key: str | None, draw: Callable[[], float] = random.random) -> Version:
    """The version for one request: by weight, and the same one for every request with the same key.

    The weights cut [0, 1) into intervals, the newest version's first. A key lies at a fixed point of it, so while the
    newest version grows from 10% to 50% its interval only gets longer: who is on it stays on it. In general no key goes
    back to an older version as long as no version's share, together with those of all newer ones, gets smaller. The
    points of another alias are others (its salt), so its canary does not meet the same users.

    draw: a number in [0, 1) for a request without a key, or with an empty one.

    Raises UsageError R432, when nothing is served under this name.
    """
    point = place(alias.salt, sticky_key) if sticky_key else draw()
    serving = [version for version in reversed(alias.versions) if alias.weights.get(version.number, 0) > 0]
    if not serving:
        raise UsageError("R432", f"no version of {alias.name!r} is served", "promote one")
    for version in serving:
        point -= alias.weights[version.number]
        if point < 0:
            return version
    return serving[-1]  # the weights sum to 1 but for rounding


def place(salt: str, key: str) -> float:
    """Where a key lies in [0, 1): the first 53 bits of sha256(salt, key), which is as even as random draws."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
