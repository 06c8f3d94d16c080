"""``adapter:`` the parameter-efficient method. The section absent means that the weights themselves are trained."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from rayft.config.section import Section

AdapterMethod = Literal["lora", "adalora", "ia3", "oft", "prefix", "prompt", "p_tuning"]
INITIALISATIONS = r"gaussian|orthogonal|olora|pissa|pissa_niter_\d+|loftq"
"""Those that look at the data or at gradients first (eva, corda, lora_ga) are not among them."""


class Adapter(Section):
    method: AdapterMethod = "lora"
    """PEFT method."""
    rank: int = Field(16, ge=1)
    """`r` of LoRA, AdaLoRA (its target rank) and OFT (its block count)."""
    alpha: float = Field(32, gt=0)
    """`lora_alpha`: the update is scaled by alpha / rank (alpha / sqrt(rank) with `use_rslora`)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """`lora_dropout`."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (without the head), `attention`, `mlp`, a list of module-name suffixes, or a regular expression."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks stable (arXiv 2312.03732)."""
    use_dora: bool = False
    """Learn the length of each weight column apart from its direction (DoRA, arXiv 2402.09353)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias terms of the base are trained too."""
    init_lora_weights: bool | str = True
    """PEFT's initialisations: true, gaussian, orthogonal, olora, pissa, pissa_niter_N, loftq."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """LoRA+ (arXiv 2402.12354): learning rate of B over that of A."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full and saved beside the adapter."""
    num_virtual_tokens: int = Field(20, ge=1)
    """Length of the learned prefix or prompt (prefix, prompt, p_tuning)."""
    init_from: str | None = None
    """`run:NAME` or an adapter folder to continue from."""
    peft_args: dict[str, Any] = Field(default_factory=dict)
    """Any further argument of the PEFT config of this method, checked against its signature."""

    @field_validator("init_lora_weights")
    @classmethod
    def _known_initialisation(cls, value: object) -> object:
        if isinstance(value, str) and not re.fullmatch(INITIALISATIONS, value):
            raise ValueError("allowed are true, gaussian, orthogonal, olora, pissa, pissa_niter_N and loftq")
        return value
