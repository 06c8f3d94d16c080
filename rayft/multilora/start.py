"""The start of an adapter: exactly the one that `rayft train` would give it."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayft.config.recipe import Recipe
from rayft.models import adapters
from rayft.multilora.bank import PREFIX, AdapterState


def initial(
    model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, init_from: str | None = None
) -> AdapterState:
    """What PEFT puts on this model for this recipe and its seed (or reads from ``init_from``), taken off again.

    PEFT itself does it, on the shared base, so every kind of initialisation, pattern and target is the same as in
    `rayft.train`. Call it between passes.
    """
    adapted: Any = adapters.attach(model, recipe, tokenizer, init_from=init_from)
    config = copy.deepcopy(adapted.peft_config["default"])
    tensors = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A["default"].weight.detach()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B["default"].weight.detach()
    adapted.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config  # a trace that PEFT leaves, and takes for an adapter the next time
    return AdapterState(config, tensors)
