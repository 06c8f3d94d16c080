"""How much a key may ask for: requests per second, tokens per minute, requests at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rayft.serve.errors import ApiError
from rayft.serve.keys import Key


@dataclass
class Bucket:
    """A token bucket: it fills with ``rate`` per second up to ``size``, and who takes more than is there waits."""

    rate: float
    size: float
    level: float
    at: float
    """When the level was right, in seconds."""

    def wait(self, amount: float, now: float) -> float:
        """Seconds until that much is there; 0 = it is."""
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now
        return max(0.0, (min(amount, self.size) - self.level) / self.rate)


@dataclass
class Ticket:
    """A request that was let in. `settle` it when it has ended, in whatever way."""

    _state: _State
    _reserved: float

    def settle(self, tokens: int) -> None:
        """tokens: of prompts and answers, that it took."""
        self._state.running -= 1
        if self._state.tokens is not None:
            # The level may fall below zero, since nobody knew how long the prompt was: what follows pays for it.
            self._state.tokens.level += self._reserved - tokens


@dataclass
class _State:
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0


class Limits:
    """Of all keys. For one process: several would each allow as much."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, tuple[Key, _State]] = {}

    def enter(self, key: Key, tokens: int) -> Ticket:
        """tokens: the most that the answers may have; they are reserved until the request ends. More than a minute's
        worth is let in when a whole minute's is there.

        Raises:
            ApiError: R834, which says when to come back.
        """
        state = self._state(key)
        now = self._clock()
        if key.concurrency is not None and state.running >= key.concurrency:
            raise _over(key, f"{key.concurrency} requests at a time", 1.0)
        if state.requests is not None and (wait := state.requests.wait(1, now)) > 0:
            raise _over(key, f"{key.requests_per_second:g} requests per second", wait)
        reserved = 0.0
        if state.tokens is not None:
            if (wait := state.tokens.wait(tokens, now)) > 0:
                raise _over(key, f"{key.tokens_per_minute} tokens per minute", wait)
            reserved = min(tokens, state.tokens.size)
            state.tokens.level -= reserved
        if state.requests is not None:
            state.requests.level -= 1
        state.running += 1
        return Ticket(state, reserved)

    def _state(self, key: Key) -> _State:
        """Of the key; limits that were changed in the file begin anew."""
        known = self._states.get(key.hash)
        if known is not None and known[0] == key:
            return known[1]
        now = self._clock()
        rate, tokens = key.requests_per_second, key.tokens_per_minute
        state = _State(
            None if rate is None else Bucket(rate, max(1.0, rate), max(1.0, rate), now),
            None if tokens is None else Bucket(tokens / 60, tokens, tokens, now),
            known[1].running if known else 0,
        )
        if known is not None:  # requests in flight settle with the state that let them in
            state.running = 0
        self._states[key.hash] = (key, state)
        return state


def _over(key: Key, limit: str, wait: float) -> ApiError:
    return ApiError("R834", f"{key.name} is over its limit of {limit}", f"again in {wait:.1f} s", retry_after=wait)
