"""``model:`` which base weights, in which number format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayft.config.section import Section


class Model(Section):
    base: str
    """Alias (see `rayft models list`), local folder, Hub id, bucket URI, `.gguf` file, or `run:NAME` (merged)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format of the frozen weights and of the computation. Trainable weights are always fp32 masters.
    `auto`: bf16 where the device has bf16 arithmetic, else fp32."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """bitsandbytes quantisation of the frozen base (QLoRA)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the 4-bit scales too (0.4 bit per weight less)."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. `auto`: flash_attention_2 where installed and on a GPU, else sdpa."""
    trust_remote_code: bool = False
    """Run Python code that a model repository brings along."""
    add_tokens: list[str] = Field(default_factory=list)
    """New tokens: embeddings grow, the new rows start at the mean, and under an adapter only those rows are trained."""
