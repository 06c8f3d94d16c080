"""LoftQ (arXiv 2310.08659): LoRA starts as the best low-rank correction of the base's quantisation error."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open


def initialize(model: PeftModel, folder: str) -> None:
    """Set A and B of every 4-bit layer so that ``scaling * B @ A`` is the best approximation of ``W - dequantised(W)``.

    One step of the paper's algorithm 1: the base stays as bitsandbytes quantised it, so the adapter loads on a stock
    4-bit base. PEFT's own routine needs CUDA and leaves out the scaling. ``folder`` holds the unquantised weights as
    safetensors.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, Linear4bit)
    }
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            for name in set(tensors.keys()).intersection(f"{layer}.weight" for layer in layers):
                layer = layers[name.removesuffix(".weight")]
                quantised = layer.get_base_layer().weight
                exact = tensors.get_tensor(name).to(quantised.device, torch.float32)
                error = exact - dequantize_4bit(quantised.data, quantised.quant_state).float()
                left, singular, right = torch.linalg.svd(error, full_matrices=False)
                rank, root = layer.r["default"], singular.sqrt()
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                a.copy_(root[:rank, None] * right[:rank])
                b.copy_(left[:, :rank] * root[:rank] / layer.scaling["default"])
