"""What a training process needs in memory, from the recipe and the base's config.json alone; no weights are loaded.

The parts follow ZeRO (arXiv 1910.02054, section 3) for weights, gradients and optimiser state, and Korthikanti et al.
(arXiv 2205.05198, section 4) for activations, counted anew for blocks with RMS norms, a gated MLP, fused attention and
a loss computed in chunks. Dense decoder-only models are met within a tenth; mixtures of experts need less than it says.

Measured with SmolLM2-135M, LoRA, bf16, on a CPU: at 1024 tokens the peak of all tensors was met within 1%, the
process grew by a tenth more; at 2048 tokens by a further 0.4 to 0.8 of the activations, which the allocator kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rayft.config.adapter import Adapter
from rayft.config.model import Model
from rayft.config.recipe import Recipe
from rayft.config.train import Trainable
from rayft.models import attention
from rayft.models.load import dtype_of, torch_dtype
from rayft.models.partial import add_biases, ever_trained
from rayft.models.peft_config import CHANGES_BASE, linear_layers, peft_config
from rayft.models.quiet import quiet
from rayft.objectives.causal import CHUNK_ROWS

SHARDED_FROM = {"ddp": (99, 99, 99), "zero1": (1, 99, 99), "zero2": (1, 1, 99), "zero3": (1, 1, 1), "fsdp": (1, 1, 1)}
"""Whether a strategy shards (optimiser state, gradients, weights): 1 = yes."""
STATE_BYTES = {"adamw": 8.0, "adam": 8.0, "lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0, "sgd": 0.0}
"""Optimiser state per trained value with 32-bit states; 8-bit states take a quarter and a scale per 256 values."""
RUNTIME = {"cpu": 800 * 2**20, "gpu": 600 * 2**20}
"""Libraries in a process, or a CUDA context with its kernels."""


@dataclass(frozen=True)
class Estimate:
    """Bytes per device (per process on a CPU) while training; ``offloaded`` is host memory per process beside it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    offloaded: int = 0
    trainable_parameters: int = 0
    parameters: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device: the sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.runtime


def estimate(
    recipe: Recipe,
    folder: str,
    *,
    workers: int = 1,
    micro_batch_size: int = 1,
    tokens: int | None = None,
    device: str = "cpu",
) -> Estimate:
    """Memory of one of ``workers`` processes on ``device`` ("cpu" or "gpu").

    tokens: of the largest micro-batch, padding included; ``micro_batch_size * data.max_length`` unless known better.
    """
    dtype = torch_dtype(dtype_of(recipe, device))
    model = _skeleton(recipe, folder)
    zero = recipe.scale.strategy.startswith("zero")
    state_shards, gradient_shards, weight_shards = (
        workers if start == 1 else 1 for start in SHARDED_FROM[recipe.scale.strategy]
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    values = sum(p.numel() for p in trainable)
    half = dtype != torch.float32

    frozen = _frozen_bytes(model, recipe.model, dtype)
    master = 4 * values
    state = _state_bytes(recipe.train.optim, recipe.train.optim_args, trainable)
    if zero:  # the module holds weights and gradients in the dtype of the computation, the optimiser the fp32 masters
        weights = (frozen + dtype.itemsize * values) / weight_shards
        gradients = dtype.itemsize * values / gradient_shards
        state = (state + master) / state_shards
    else:
        casts = dtype.itemsize * sum(p.numel() for p in trainable if p.ndim > 1) if half else 0
        weights = (frozen + master) / weight_shards + casts
        gradients = 4 * values / gradient_shards * (2 if workers > 1 and weight_shards == 1 else 1)  # DDP's buckets
    paged = recipe.train.optim.startswith("paged") and device != "cpu"
    offloaded = 0.0
    if paged or (zero and recipe.scale.offload):
        offloaded, state = state, 0.0
    if recipe.scale.offload and recipe.scale.strategy == "zero3":
        offloaded, weights = offloaded + weights, 0.0

    tokens = tokens or micro_batch_size * recipe.data.max_length
    return Estimate(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(state),
        activations=round(tokens * _activation_bytes(model, recipe, dtype, device)),
        logits=round(_logit_bytes(model, tokens, dtype)),
        runtime=RUNTIME["cpu" if device == "cpu" else "gpu"],
        offloaded=round(offloaded),
        trainable_parameters=values,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def trained_tensors(recipe: Recipe, folder: str) -> dict[str, torch.Tensor]:
    """What training changes, by the names it is saved under: fp32 masters without memory behind them (device meta)."""
    named = _skeleton(recipe, folder).named_parameters()
    return {name.replace(".default.", "."): p.detach().float() for name, p in named if p.requires_grad}


def _skeleton(recipe: Recipe, folder: str) -> Any:
    """The model as it will be trained, without memory behind its tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        if recipe.adapter is not None:
            plain = _without_initialisation(recipe.adapter)
            return get_peft_model(model, peft_config(plain, model, total_steps=100))
    trainable = recipe.train.trainable
    phases: list[Trainable] = list(trainable) if isinstance(trainable, list) else [trainable] if trainable else []
    if any(phase.add_bias for phase in phases):
        add_biases(model)
    ever = ever_trained(model, phases)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not phases or name in ever)
    return model


def _base(model: Any) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _without_initialisation(adapter: Adapter) -> Adapter:
    """Sizes do not depend on how an adapter starts, and PiSSA or OLoRA would look at the weights."""
    looks = str(adapter.init_lora_weights).startswith((*CHANGES_BASE, "loftq"))
    return adapter.model_copy(update={"init_lora_weights": True}) if looks else adapter


def _frozen_bytes(model: nn.Module, section: Model, dtype: torch.dtype) -> float:
    """Bytes of the frozen parameters as they are stored: quantised, or in the dtype of the computation."""
    linear = linear_layers(_base(model)).values() if section.quantization else []
    quantised = {id(layer.weight) for layer in linear}
    return sum(
        _quantised_bytes(p, section) if id(p) in quantised else p.numel() * dtype.itemsize
        for p in model.parameters()
        if not p.requires_grad
    )


def _quantised_bytes(weight: torch.Tensor, section: Model) -> float:
    """bitsandbytes: int8 with one fp32 scale per row; 4 bits with one per 64 values, which may be quantised in turn."""
    if section.quantization == "int8":
        return weight.numel() + 4 * weight.shape[0]
    scale = 1 + 4 / 256 if section.bnb_4bit_use_double_quant else 4
    return weight.numel() * (0.5 + scale / 64)


def _state_bytes(optim: str, optim_args: str | None, parameters: list[nn.Parameter]) -> float:
    """State of the optimiser in bytes; unknown ones count like AdamW."""
    if "adafactor" in optim:  # one row and one column of averages per matrix (arXiv 1804.04235)
        return float(sum(4 * (sum(p.shape) if p.ndim > 1 else p.numel()) for p in parameters))
    name = optim.removeprefix("paged_")
    per_value = next((size for start, size in STATE_BYTES.items() if name.startswith(start)), 8.0)
    if name.startswith("sgd") and "momentum" in (optim_args or ""):
        per_value = 4.0
    if "8bit" in name:
        per_value = per_value / 4 * (1 + 4 / 256)
    return per_value * sum(p.numel() for p in parameters)


def _activation_bytes(model: Any, recipe: Recipe, dtype: torch.dtype, device: str) -> float:
    """Bytes per token that wait for the backward pass, at their peak.

    Per block: two norms keep their input in fp32 (and their output, where they are trained), linear layers keep their
    input, attention keeps q, k, v and its output, the MLP four vectors of its inner width. A model whose own weights
    are trained has an fp32 residual stream, and each linear layer casts it anew.
    """
    config = model.config.get_text_config()
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    q, kv = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    c, adapter = dtype.itemsize, recipe.adapter
    full = adapter is None
    inputs = 6 if full and c < 4 else 3
    block = 4 * hidden * (4 if full else 2) + c * ((inputs - 1) * hidden + 2 * q + 2 * kv + 4 * inner) + 4 * heads + 8
    if adapter is not None and adapter.method in ("lora", "adalora"):
        block += c * 7 * adapter.rank
    moving = any(p.requires_grad for p in _base(model).get_input_embeddings().parameters())
    if device == "cpu" and dtype == torch.bfloat16 and not moving and attention.wanted(recipe):
        block += c * heads * min(recipe.data.max_length, attention.LONGEST_BY_MATMUL)  # probabilities of short examples
    blocks = _blocks_with_gradient(model, config.num_hidden_layers)
    backward = c * (2 * hidden + 3 * inner)
    if recipe.train.gradient_checkpointing:
        return blocks * hidden * (4 if full else c) + block + backward
    return blocks * block + backward


def _blocks_with_gradient(model: nn.Module, count: int) -> int:
    """Blocks that the backward pass goes through: from the lowest trained parameter upwards."""
    base = _base(model)
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if base is not model and not any(p.requires_grad for p in base.parameters()):
        return count  # virtual tokens stand before the first block
    if not lists or any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        return count
    trained = [i for i, block in enumerate(lists[0]) if any(p.requires_grad for p in block.parameters())]
    return count - trained[0] if trained else 0


def _logit_bytes(model: Any, tokens: int, dtype: torch.dtype) -> float:
    """One chunk of logits with its fp32 copy and both gradients, and the head's own gradient where it is trained."""
    head = _base(model).get_output_embeddings()
    chunk = min(tokens, CHUNK_ROWS) * model.config.get_text_config().vocab_size * (2 * dtype.itemsize + 8)
    return chunk + sum(4 * p.numel() for p in head.parameters() if p.requires_grad)
