"""The limits of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """Names that vLLM has too mean the same here."""

    max_num_seqs: int = 64
    """Most requests that are computed together."""
    max_num_batched_tokens: int = 512
    """Most tokens of one step: all decoding requests, then pieces of prompts. At least `max_num_seqs`."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; the model's context length by default."""
    kv_cache_tokens: int = 65536
    """Most tokens whose keys and values are kept at a time, for requests and for the prefix cache."""
    max_loras: int = 32
    """Most adapters on the device at a time."""
    enable_prefix_caching: bool = True
    block_size: int = 16
    """Tokens per block of the prefix cache: prefixes are shared in whole blocks."""
    max_queued_tokens: int = 262144
    """A request is refused while the prompts that wait hold more tokens than this."""
    longest_wait: float = 2.0
    """Seconds after which a request whose tenant and adapter have less than their share goes first, if need be in the
    place of another."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens is at least max_num_seqs: every request decodes in every step")
