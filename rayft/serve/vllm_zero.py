"""The bare base as an adapter that changes nothing.

vLLM's CPU build computes the rows of the base in a batch with adapters as if they were the last adapter's
(vllm-project/vllm#48421, open in 0.32). With a zero adapter no row of a batch is without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from rayft.multilora.bank import AdapterState
from rayft.serve.job import Content


def skeleton(folder: str, trust_remote_code: bool = False) -> Any:
    """The base without weights: its modules, their shapes, its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def zero_adapter(model: Any, folder: str | Path) -> Content:
    """Write an adapter of rank 1 for one layer of ``model`` (`skeleton`), all zeros, and say what it is."""
    target, rows, columns = _first_layer(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(r=1, lora_alpha=1, target_modules=[target.rpartition(".")[2]], task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )
    tensors = {
        f"base_model.model.{target}.lora_A.weight": torch.zeros(1, columns),
        f"base_model.model.{target}.lora_B.weight": torch.zeros(rows, 1),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2, sort_keys=True))
    return Content(AdapterState.read(folder).content_hash(), str(folder.absolute()))


def _first_layer(model: Any) -> tuple[str, int, int]:
    """(name, outputs, inputs) of the first linear layer that is not the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or not hasattr(module, "weight") or module.weight.dim() != 2:
            continue
        if isinstance(module, torch.nn.Linear):
            return name, module.out_features, module.in_features
        if type(module).__name__ == "Conv1D":  # GPT-2's, with weights the other way round
            return name, module.weight.shape[1], module.weight.shape[0]
    raise ValueError("the base has no linear layer")
