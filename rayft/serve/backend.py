"""What the HTTP side knows of the engines behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayft.serve.job import Content, Job, Piece


@dataclass(frozen=True)
class ModelCard:
    """The base model that is served."""

    name: str
    """As requests may name it."""
    base_hash: str | None
    """Of the base's weights; an adapter whose run names another one is refused."""
    architecture: str
    dtype: str
    quantization: str | None
    parameters: int
    """Of the base, unpacked from quantisation; tied weights count once."""
    vocabulary: int
    max_model_len: int
    created: int
    """Seconds since the epoch."""


@dataclass(frozen=True)
class ReplicaState:
    """What one replica is doing now."""

    id: str
    running: int
    """Requests in the batch."""
    waiting: int
    queued_tokens: int
    kv_cache_usage: float
    """Share of the budget, 0 to 1."""
    loaded: tuple[str, ...]
    """Content hashes in device slots."""
    cached: tuple[str, ...]
    """Content hashes in host memory."""
    max_loras: int
    steps: int
    preemptions: int
    prompt_tokens: int
    """Of all requests that ended, and so are the next two."""
    cached_tokens: int
    completion_tokens: int
    memory: int
    """Resident bytes of the process."""
    gpu_memory: int | None = None
    gpu_utilization: float | None = None


class Backend(Protocol):
    """One replica in this process, many on a cluster, or another server."""

    async def card(self) -> ModelCard:
        """Returns when the model is loaded."""
        ...

    def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        """Pieces as they come; several that came together in one item. Closing the iterator cancels the job.

        Raises, before the first item:
            UsageError: R811, R812, R815, R817 (grammar), R818 (template), R801 to R803 (the adapter's files).
            Overloaded: R813.
        """
        ...

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        """Bring an adapter into every replica before it is asked for; pinned: keep it there, or no longer.

        Raises UsageError R801, R802, R803, R816.
        """
        ...

    async def unload(self, hash: str) -> None:
        """Free an adapter on every replica as soon as no running request uses it; unknown to a replica is no error."""
        ...

    async def states(self) -> list[ReplicaState]: ...
