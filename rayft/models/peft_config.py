"""The ``adapter:`` section as a PEFT config: names, defaults and checks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import peft
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayft.config.adapter import Adapter
from rayft.config.trainer_args import check_names
from rayft.errors import UsageError

CONFIGS: dict[str, type[PeftConfig]] = {
    "lora": peft.LoraConfig,
    "adalora": peft.AdaLoraConfig,
    "ia3": peft.IA3Config,
    "oft": peft.OFTConfig,
    "prefix": peft.PrefixTuningConfig,
    "prompt": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
}
VIRTUAL_TOKENS = ("prefix", "prompt", "p_tuning")
TRAINS_TOKENS = ("lora", "adalora")
"""Methods whose PEFT config has ``trainable_token_indices``."""

MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe", re.IGNORECASE)
PLACES = {"all-linear": re.compile(""), "attention": re.compile(r"attn|attention", re.IGNORECASE), "mlp": MLP}
"""Words for linear layers by the name of the module they stand in."""
CHANGES_BASE = ("pissa", "olora")
"""Initialisations that take their part out of the base's weights; such adapters are converted when they are saved."""


def peft_config(
    adapter: Adapter,
    model: PreTrainedModel,
    *,
    token_ids: list[int] | None = None,
    total_steps: int | None = None,
) -> PeftConfig:
    """The config of PEFT for a method on this model.

    token_ids: rows of the embedding (and of the head) that are trained beside the adapter. total_steps: optimiser steps
    of the run; AdaLoRA's schedule needs it.

    Raises:
        UsageError: R108 or R321 (peft_args), R320 (target_modules), R322 (LoftQ), R323 (DoRA), R325 (add_tokens).
    """
    kind = CONFIGS[adapter.method]
    known = [field.name for field in dataclasses.fields(kind)]
    check_names("adapter.peft_args", adapter.peft_args, known, f"peft.{kind.__name__}")
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if adapter.method in VIRTUAL_TOKENS:
        fields["num_virtual_tokens"] = adapter.num_virtual_tokens
    else:
        fields["target_modules"] = target_modules(adapter.target_modules, model)
        fields["modules_to_save"] = adapter.modules_to_save or None
    fields |= _OF_METHOD.get(adapter.method, _nothing)(adapter, model, total_steps)
    if token_ids:
        if adapter.method not in TRAINS_TOKENS:
            raise UsageError(
                "R325",
                f"model.add_tokens with adapter.method={adapter.method}: PEFT trains single rows beside LoRA only",
                f"adapter.method={' or '.join(TRAINS_TOKENS)}, or no adapter section",
            )
        fields["trainable_token_indices"] = _token_rows(model, token_ids)
    try:
        return kind(**(fields | adapter.peft_args))
    except (TypeError, ValueError) as error:
        raise UsageError("R321", f"adapter: {kind.__name__} refuses: {error}") from error


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers by name (quantised ones too), without the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def target_modules(wanted: str | list[str], model: nn.Module) -> str | list[str]:
    """``all-linear``, ``attention``, ``mlp``, name suffixes or a regular expression, as PEFT takes it.

    Raises:
        UsageError: R320, naming the model's linear layers, when a choice matches none of its modules.
    """
    linear = linear_layers(model)
    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str) and wanted in PLACES:
        chosen = [name for name in linear if PLACES[wanted].search(name.rpartition(".")[0])]
        _need(chosen, wanted, linear)
        ends = {name.rpartition(".")[2] for name in chosen}
        others = {name.rpartition(".")[2] for name in set(names) - set(chosen)}
        return sorted(ends) if ends.isdisjoint(others) else chosen
    if isinstance(wanted, str):
        try:
            _need([name for name in names if re.fullmatch(wanted, name)], wanted, linear)
        except re.error as error:
            raise UsageError("R320", f"adapter.target_modules: {wanted} is no regular expression: {error}") from error
        return wanted
    for suffix in wanted:
        _need([name for name in names if name == suffix or name.endswith(f".{suffix}")], suffix, linear)
    return wanted


def _need(found: list[str], wanted: str, linear: dict[str, nn.Module]) -> None:
    if not found:
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise UsageError(
            "R320",
            f"adapter.target_modules: {wanted} matches no module of this model; its linear layers end in {ends}",
            "all-linear, attention, mlp, a list of such endings, or a regular expression on the whole name",
        )


def _token_rows(model: PreTrainedModel, token_ids: list[int]) -> dict[str, list[int]]:
    """Rows by module: one entry where head and embedding are the same matrix, two where they are not."""
    names = {module: name for name, module in model.named_modules()}
    modules = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    return {names[module].rpartition(".")[2]: token_ids for module in modules}


def _nothing(adapter: Adapter, model: PreTrainedModel, total_steps: int | None) -> dict[str, Any]:
    return {}


def _lora(adapter: Adapter, model: PreTrainedModel, total_steps: int | None) -> dict[str, Any]:
    if adapter.use_dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        raise UsageError(
            "R323",
            "adapter.use_dora on an int8 base on a CPU: PEFT loses the scales of the weights after the first step",
            "model.quantization=nf4",
        )
    return {
        "r": adapter.rank,
        "lora_alpha": _whole(adapter.alpha),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "bias": adapter.bias,
        "init_lora_weights": _initialisation(adapter.init_lora_weights, model),
    }


def _adalora(adapter: Adapter, model: PreTrainedModel, total_steps: int | None) -> dict[str, Any]:
    """The budget starts at 1.5 times its end (section 4.1 of arXiv 2303.10512), shrinks after a tenth of the steps, and
    is fixed for the last three tenths."""
    if total_steps is None:
        raise TypeError("AdaLoRA needs total_steps")
    return {
        "target_r": adapter.rank,
        "init_r": -(-3 * adapter.rank // 2),
        "tinit": total_steps // 10,
        "tfinal": 3 * total_steps // 10,
        "total_step": total_steps,
        "lora_alpha": _whole(adapter.alpha),
        "lora_dropout": adapter.dropout,
    }


def _ia3(adapter: Adapter, model: PreTrainedModel, total_steps: int | None) -> dict[str, Any]:
    """IA3 scales what a layer gives or, for the last layer of an MLP, what it takes (arXiv 2205.05638, section 3.3)."""
    targets = target_modules(adapter.target_modules, model)
    width = model.config.hidden_size
    feedforward = [
        name
        for name, module in linear_layers(model).items()
        if MLP.search(name.rpartition(".")[0]) and _out_features(module) == width and targeted(name, targets)
    ]
    return {"target_modules": targets, "feedforward_modules": sorted({name.rpartition(".")[2] for name in feedforward})}


def _oft(adapter: Adapter, model: PreTrainedModel, total_steps: int | None) -> dict[str, Any]:
    if "oft_block_size" in adapter.peft_args:
        return {"r": 0, "module_dropout": adapter.dropout}
    return {"r": adapter.rank, "oft_block_size": 0, "module_dropout": adapter.dropout}


_OF_METHOD: dict[str, Callable[[Adapter, PreTrainedModel, int | None], dict[str, Any]]] = {
    "lora": _lora,
    "adalora": _adalora,
    "ia3": _ia3,
    "oft": _oft,
}


def _initialisation(wanted: bool | str, model: PreTrainedModel) -> bool | str:
    if wanted == "loftq":
        if not getattr(model, "is_loaded_in_4bit", False):
            raise UsageError(
                "R322",
                "adapter.init_lora_weights: loftq starts the adapter at the error of 4-bit weights; the base has none",
                "model.quantization=nf4",
            )
        return True  # our own step after PEFT's, see loftq.py
    return wanted


def _whole(value: float) -> int | float:
    """16 rather than 16.0: other readers of adapter_config.json expect an integer."""
    return int(value) if float(value).is_integer() else value


def _out_features(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features  # type: ignore[return-value]  # Conv1D is untyped


def targeted(name: str, targets: str | list[str]) -> bool:
    """Whether PEFT puts an adapter on the module of that name for these ``target_modules``."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in targets)
