"""``serve:`` where the server listens, what it may load, how its engine is sized and what clients may ask for."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rayft.config.section import Section


class Serve(Section):
    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs `api_keys`, or `--insecure`."""
    port: int = Field(8000, ge=0, le=65535)
    """0 = any free port."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name -> `run:NAME[@...]`, folder or bucket: adapters that are served from the start."""
    registry: str | None = None
    """Folder of the registry of names and versions, which replicas and `rayft registry` share; `STORAGE/registry` by
    default."""
    roots: list[str] = Field(default_factory=list)
    """Folders, buckets (`s3://bucket/prefix`) or Hub owners (`hf://owner`) that adapters may be loaded from while the
    server runs, besides the runs in `storage`."""
    backend: Literal["auto", "rayft", "vllm"] = "auto"
    """Which engine answers; `auto` is rayft's own."""
    vllm_python: str | None = None
    """Python interpreter that has vLLM, in an environment of its own; by default the `vllm` on PATH."""
    vllm_args: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """More options of `vllm serve`, such as `gpu_memory_utilization: 0.8`; they win over what the recipe says, and
    null leaves an option out."""
    replicas: int | tuple[int, int] = 1
    """Number of engines; [min, max] scales with `target_queued_tokens`."""
    target_queued_tokens: int = Field(4096, ge=1)
    """Tokens of prompts waiting per replica above which another replica is started."""
    max_model_len: int | None = Field(None, ge=1)
    """Most tokens of prompt and answer together; the model's context length by default."""
    max_num_seqs: int = Field(64, ge=1)
    """Most requests that are computed together."""
    max_num_batched_tokens: int = Field(512, ge=1)
    """Most tokens of one step; at least `max_num_seqs`."""
    kv_cache_tokens: int = Field(65536, ge=1)
    """Most tokens whose keys and values are kept at a time, for requests and for the prefix cache."""
    max_loras: int = Field(32, ge=1)
    """Most adapters on the device at a time."""
    max_lora_rank: int = Field(256, ge=1)
    """Largest rank of an adapter that is accepted."""
    host_cache: int = Field(2 * 2**30, ge=0)
    """Bytes of host memory for adapters; beyond it those that were not used for longest are left to the disk."""
    enable_prefix_caching: bool = True
    """Whether prompts that begin alike are computed once."""
    block_size: int = Field(16, ge=1)
    """Tokens per block of the prefix cache."""
    max_queued_tokens: int = Field(262144, ge=1)
    """A request is refused with 429 while the prompts that wait on a replica hold more tokens than this."""
    longest_wait: float = Field(2.0, gt=0)
    """Seconds after which a request of a tenant and adapter with less than their share goes first."""
    api_keys: str | None = None
    """File of the API keys, as `rayft keys add` writes it: hashes, never the keys."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt; longer ones are refused with 400. Default: what fits the context."""
    request_timeout: float | None = Field(None, gt=0)
    """Seconds after which a request ends with 408, or in a stream with an error; none by default."""
    response_cache: int = Field(0, ge=0)
    """Answers kept for requests that are greedy or seeded and come again; 0 = off."""
    response_cache_ttl: float = Field(300.0, gt=0)
    """Seconds that an answer is kept."""
    log_requests: bool = True
    """Whether numbers about each request (times, token counts, adapter; never text) are written to `requests.jsonl`."""
    log_text: bool = False
    """Whether prompts and answers are written to `texts.jsonl` too."""
    log_text_days: float = Field(30.0, gt=0)
    """Days after which texts are deleted."""

    @field_validator("replicas", mode="before", json_schema_input_type=int | tuple[int, int])
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("replicas")
    @classmethod
    def _bounds(cls, value: object) -> object:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 1 <= low <= high:
            raise ValueError("a server has at least one replica, and [min, max] needs min <= max")
        return value

    @model_validator(mode="after")
    def _every_request_decodes_in_every_step(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens is at least max_num_seqs: every request decodes in every step")
        return self
