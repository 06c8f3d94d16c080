"""Adapters that are more than LoRA on the layers of the blocks, each alone on its own base in stock PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rayft.multilora.bank import AdapterState

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "small dora": {"target_modules": ["o_proj"], "use_dora": True, "use_rslora": True, "r": 2},
    "head": {"target_modules": [*LINEAR, "lm_head"]},
    "dora head": {"target_modules": ["lm_head", "up_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora embedding": {"target_modules": ["embed_tokens", "gate_proj"], "use_dora": True},
    "whole head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "whole norms": {"target_modules": LINEAR, "modules_to_save": ["input_layernorm", "norm"]},
    "whole mlp": {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "lm_head", "embed_tokens"]},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": list(range(5, 300, 3))},
}
TIED: dict[str, dict[str, Any]] = {
    "plain": CONFIGS["plain"],
    "tokens": CONFIGS["tokens"],
    "whole embedding": CONFIGS["whole embedding"],
    "whole both": CONFIGS["whole embedding"] | {"ensure_weight_tying": True},
    "head": CONFIGS["head"],
    "embedding": CONFIGS["embedding"],
}
"""For a base whose head is its embedding."""
BIASED: dict[str, dict[str, Any]] = {
    "plain": CONFIGS["plain"],
    "all biases": {"target_modules": LINEAR, "bias": "all"},
    "own biases": {"target_modules": LINEAR, "bias": "lora_only"},
    "dora": CONFIGS["dora"],
    "dora with biases": {"target_modules": LINEAR, "bias": "all", "use_dora": True},
}
"""For a base whose layers have biases."""


@dataclass
class Stock:
    """One PEFT model per adapter, and the bare base."""

    base: Any
    models: dict[str, Any] = field(default_factory=dict)
    states: dict[str, AdapterState] = field(default_factory=dict)

    def logits(self, ids: torch.Tensor, adapter: str | None) -> torch.Tensor:
        """[batch, length, vocabulary] of one adapter, alone."""
        model = self.base if adapter is None else self.models[adapter]
        with torch.no_grad():
            logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits


def stock(load: Callable[[], Any], configs: dict[str, dict[str, Any]], folder: Path) -> Stock:
    """load: the base, anew for each adapter, which is changed at random, written to ``folder`` and read again."""
    found = Stock(load().eval())
    for number, (name, fields) in enumerate(configs.items()):
        torch.manual_seed(100 + number)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 4, "lora_alpha": 8} | fields)
        model: Any = get_peft_model(load(), config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_magnitude_vector" in path:
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
                elif "modules_to_save" in path or "trainable_tokens_delta" in path or path.endswith(".bias"):
                    size = parameter.std() if parameter.ndim > 1 else 0.3
                    parameter.add_(size * torch.randn_like(parameter) * parameter.requires_grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it saves the embedding as well
            model.save_pretrained(str(folder / name))
        found.models[name] = PeftModel.from_pretrained(load(), str(folder / name)).eval()
        found.states[name] = AdapterState.read(folder / name)
    return found
