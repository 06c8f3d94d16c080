"""What is trained on a base model: an adapter, parts of the weights, or all of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayft.config.adapter import Adapter
from rayft.config.recipe import Recipe
from rayft.config.train import Trainable
from rayft.errors import UsageError
from rayft.models import loftq
from rayft.models.adalora import adalora_state, load_adalora_state, orthogonal_penalty, update_budget
from rayft.models.identity import base_hash
from rayft.models.load import dtype_of, torch_dtype
from rayft.models.optimizer import StartWeights, optimizer_groups
from rayft.models.partial import add_biases, apply_phase, ever_trained, phase_at, thaw
from rayft.models.peft_config import CHANGES_BASE, CONFIGS, peft_config
from rayft.models.save import save
from rayft.models.state import load_training_state, training_state
from rayft.models.tokens import add_tokens

__all__ = [
    "StartWeights",
    "adalora_state",
    "apply_phase",
    "attach",
    "load_adalora_state",
    "load_training_state",
    "optimizer_groups",
    "orthogonal_penalty",
    "parameter_counts",
    "phase_at",
    "save",
    "thaw",
    "training_state",
    "update_budget",
]


def attach(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    init_from: str | None = None,
    total_steps: int | None = None,
) -> nn.Module:
    """Make a base model from `load.load_base` trainable as the recipe says.

    New tokens get their rows, the adapter is put on (or biases are added), everything else is frozen. Trainable weights
    become fp32 masters; frozen ones are in the number format of the computation. The initialisation depends on
    ``recipe.seed`` alone. Run the forward pass in `load.compute_context`.

    init_from: folder of an adapter to continue. total_steps: optimiser steps of the run, needed by AdaLoRA.

    Raises:
        UsageError: R108 and R320 to R327, R332, when the recipe asks for what this model or method cannot do.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(recipe.seed)
        model.new_token_ids = add_tokens(model, tokenizer, recipe.model.add_tokens)
        if recipe.adapter is None:
            return _unfreeze(model, recipe)
        if init_from is not None:
            adapted = _continue(model, recipe.adapter, init_from)
        else:
            adapted = _start(model, recipe.adapter, total_steps or recipe.train.max_steps)
    _to_masters(adapted)
    _compute_in_base_dtype(adapted, recipe)
    return adapted


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; shared matrices count once, a packed 4-bit weight counts its values."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # ZeRO-3 leaves an empty shell here
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _unfreeze(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Train the weights themselves: all, a part, or phase by phase."""
    trainable = recipe.train.trainable
    if trainable is None:
        return model.requires_grad_(True)
    phases: list[Trainable] = list(trainable) if isinstance(trainable, list) else [trainable]
    if any(phase.add_bias for phase in phases):
        add_biases(model)
    ever = ever_trained(model, phases)
    dtype = torch_dtype(dtype_of(recipe, model.device.type))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in ever else dtype)
    apply_phase(model, phases[0])
    return model


def _start(model: PreTrainedModel, adapter: Adapter, total_steps: int | None) -> PeftModel:
    config = peft_config(adapter, model, token_ids=model.new_token_ids, total_steps=total_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on choices the recipe makes on purpose
        try:
            adapted = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise UsageError("R321", f"adapter: PEFT refuses this on this model: {error}") from error
    if adapter.init_lora_weights == "loftq":
        loftq.initialize(adapted, model.origin.folder)
    if _changes_base(adapter.init_lora_weights):
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        adapted.initial_state = {name: tensor.float().cpu().clone() for name, tensor in state.items()}
    if adapter.method == "adalora":
        # PEFT would add its penalty to every loss that passes; ours is added once per step by `orthogonal_penalty`.
        adapted.base_model.forward = BaseTuner.forward.__get__(adapted.base_model)
        for name, parameter in adapted.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)  # a constant, which PEFT thaws when it casts bf16 adapters to fp32
    return adapted


def _continue(model: PreTrainedModel, adapter: Adapter, folder: str) -> PeftModel:
    """Load an adapter to train it further; it must be of the kind that the recipe describes."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError("R324", f"adapter.init_from: {folder} is no adapter: {error}") from error
    _check_same_kind(config, adapter, folder)
    facts = Path(folder, "base.json")
    if facts.exists() and json.loads(facts.read_text())["base_hash"] != base_hash(model.origin.folder):
        raise UsageError("R332", f"adapter.init_from: {folder} was trained on another base than {model.origin.base}")
    if hasattr(config, "lora_dropout"):
        config.lora_dropout = adapter.dropout
    config.inference_mode = False
    return PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)


def _check_same_kind(config: PeftConfig, adapter: Adapter, folder: str) -> None:
    if not isinstance(config, CONFIGS[adapter.method]) or adapter.method in ("adalora", "p_tuning"):
        raise UsageError(
            "R324",
            f"adapter.init_from: {folder} holds a {config.peft_type.value} adapter, which cannot be continued with "
            f"adapter.method={adapter.method}",
            "AdaLoRA and P-tuning save what inference needs, which is not all that training needs"
            if adapter.method in ("adalora", "p_tuning")
            else None,
        )
    pairs = {"rank": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    for key, name in (pairs if adapter.method == "lora" else {}).items():
        ours, theirs = getattr(adapter, key), getattr(config, name)
        if ours != theirs:
            raise UsageError(
                "R324", f"adapter.init_from: {folder} has {key} {theirs}, the recipe {ours}", f"adapter.{key}={theirs}"
            )


def _to_masters(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _compute_in_base_dtype(model: PeftModel, recipe: Recipe) -> None:
    """Keep PEFT from casting activations up to its fp32 masters; autocast casts the masters down instead."""
    if dtype_of(recipe, model.device.type) != "fp32":
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False


def _changes_base(init_lora_weights: bool | str) -> bool:
    return str(init_lora_weights).startswith(CHANGES_BASE)
