"""A request on its way: what is known of it between its arrival and its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rayft.inference.kv_cache import Slab
from rayft.inference.request import Request, TokenEvent, Usage
from rayft.inference.sampling import Chooser
from rayft.inference.text import TextStream
from rayft.multilora.route import BASE

Flow = tuple[str, str | None]
"""Whom capacity is shared out to: a tenant's requests to one adapter (content hash)."""


@dataclass(eq=False)
class Flight:
    """Waiting while `slab` is None, else running."""

    request: Request
    adapter: str | None
    """Content hash of the adapter that answers, whatever its name stands for later."""
    chooser: Chooser
    text: TextStream
    end_ids: frozenset[int]
    """Tokens that end the answer."""
    send: Callable[[TokenEvent], object]
    waiting_since: float
    tokens: list[int] = field(init=False)
    """Prompt and answer."""
    slab: Slab | None = None
    """Holds the keys and values of the first `computed` tokens."""
    slot: int = BASE
    admitted: float = 0.0
    """When it last began to run."""
    number: int = 0
    """Counts those that began to run; 0 = has not run yet."""
    turn: int = 0
    """The last step that computed a piece of its prompt."""
    cached_tokens: int | None = None
    queued: float | None = None
    """Seconds from its arrival until it first ran."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def flow(self) -> Flow:
        return self.request.tenant, self.adapter

    @property
    def computed(self) -> int:
        return self.slab.length if self.slab else 0

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be chosen: one when decoding."""
        return len(self.tokens) - self.computed

    @property
    def cost(self) -> int:
        """Tokens that may have to be computed until the answer ends."""
        return len(self.request.prompt) + self.request.sampling.max_new_tokens

    @property
    def usage(self) -> Usage:
        prompt = len(self.request.prompt)
        return Usage(prompt, len(self.tokens) - prompt, self.cached_tokens or 0, self.queued)
