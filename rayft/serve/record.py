"""One record per request: what metrics, logs, summaries and comparisons of versions are made from. Never text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Record:
    """What a request asked for and how it went."""

    id: str
    route: str
    """`chat`, `completions` or `generate`."""
    model: str
    """As the request named it."""
    name: str
    """The base, the alias or the content hash that it stands for."""
    version: int | None
    content: str | None
    """Hash of the adapter; None for the base."""
    tenant: str
    sticky: bool
    """Whether it stays with one version."""
    stream: bool
    answers: int
    max_tokens: int | None
    """Of each answer; None = as many as the context allows."""
    time: float
    """When it came, in seconds since the epoch."""
    status: int = 0
    """HTTP's, as if it were not streamed."""
    error: str | None = None
    """Id of docs/errors."""
    finish_reasons: list[str] = field(default_factory=list)
    """Of each answer."""
    prompt_tokens: int = 0
    """The next two are what `usage` says, so they are 0 for a request that failed."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    from_cache: bool = False
    """Answered from the response cache."""
    seconds: float = 0.0
    """From its arrival to its last byte."""
    queued: float | None = None
    """Seconds of these before the first step that computed a part of it; None from vLLM and from the response cache."""
    first_token: float | None = None
    """Seconds from its arrival to the first text; only known of streams."""
    memory: int | None = None
    """Resident bytes of all replicas, and so are the next two, as they were measured last."""
    gpu_memory: int | None = None
    gpu_utilization: float | None = None
    """Share, 0 to 1; the mean of the replicas."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between chunks; not in the log."""

    def line(self) -> dict[str, Any]:
        """As it stands in `requests.jsonl`."""
        line = asdict(self)
        del line["gaps"]
        return line
