"""``scale:`` on how many machines, and what happens when one of them dies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rayft.config.section import Section


class Scale(Section):
    workers: int | Literal["auto"] | tuple[int, int] = "auto"
    """Number of training processes; `auto` takes what the cluster has; 0 runs in this process without Ray
    (for a debugger); `[min, max]` is elastic."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: GPUs where the cluster has some."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = "ddp"
    """DDP, DeepSpeed ZeRO stage 1, 2 or 3, or FSDP (accelerators only)."""
    offload: bool = False
    """ZeRO: keep optimiser state (and with zero3 the weights) in host memory."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPU cores and computing threads per worker. Default: 1 on CPU, the node's cores over its GPUs on GPU."""
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """Further Ray resources that a worker needs, such as `{"accelerator_type:A100": 0.001}`."""
    max_failures: int = Field(3, ge=-1)
    """Worker deaths and repeated errors after which the run fails; -1 = never. An error at the same step as the one
    before is never retried."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that are passed to jobs and workers. Values are never saved."""

    @field_validator("workers", mode="before", json_schema_input_type=int | Literal["auto"] | tuple[int, int])
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("workers")
    @classmethod
    def _bounds(cls, value: object) -> object:
        if isinstance(value, int) and value < 0:
            raise ValueError("a number of workers is 0 or more")
        if isinstance(value, tuple) and not 1 <= value[0] <= value[1]:
            raise ValueError("[min, max] needs 1 <= min <= max")
        return value
