"""Which keys of a recipe go together: one table, with the reason for every combination that is refused.

Validation (`check`) and docs/compatibility.md both come from `TABLE`; there is no second place that knows these rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from rayft.config.adapter import Adapter
from rayft.config.plain import leaves
from rayft.config.recipe import Recipe
from rayft.config.resolve import VIRTUAL_TOKEN_METHODS
from rayft.config.trainer_args import refusals
from rayft.config.validate import Problem, refuse

SET: Final = "given"
"""Condition: the key has a value (not null, false, 0 or empty)."""
NOT_SET: Final = "absent"
"""Condition: the key is null, false, 0 or empty."""

_ZERO = ("zero1", "zero2", "zero3")
_SHARDED = (*_ZERO, "fsdp")
_BNB = ("nf4", "fp4", "int8")
_GPU_ONLY = "it needs a GPU"

Condition = str | bool | tuple[str | bool, ...]


@dataclass(frozen=True)
class Row:
    """A combination: all conditions hold at once. `instead` is the change that makes the recipe valid."""

    when: Mapping[str, Condition]
    reason: str
    instead: str = ""
    verdict: Literal["refused", "unverified"] = "refused"

    def applies(self, facts: Mapping[str, Any]) -> bool:
        return all(_holds(facts.get(key), condition) for key, condition in self.when.items())


TABLE: tuple[Row, ...] = (
    # What is trained
    Row({"model.quantization": _BNB, "adapter": NOT_SET},
        "quantised weights have no gradient; only an adapter on top of them can be trained",
        "add an adapter section, or model.quantization=null"),
    Row({"adapter": SET, "train.trainable": SET},
        "train.trainable chooses among the base weights, which are frozen under an adapter",
        "remove one of the two; adapter.modules_to_save trains whole modules beside an adapter"),
    Row({"adapter": SET, "train.l2_sp": SET},
        "the pull towards the start weights is for weights that move; under an adapter they are frozen",
        "train.l2_sp=0, and train.weight_decay to keep the adapter small"),
    Row({"train.l2_sp": SET, "scale.strategy": ("zero3", "fsdp")},
        "a worker that holds a shard of the weights cannot measure their distance from the start",
        "scale.strategy=zero2 or ddp"),
    Row({"train.trainable": "phases", "scale.strategy": _SHARDED},
        "the set of trained weights changes at each phase, and a sharded optimiser is laid out once for all",
        "scale.strategy=ddp"),
    # Virtual tokens
    Row({"adapter.method": VIRTUAL_TOKEN_METHODS, "data.packing": True},
        "the virtual tokens stand in front of a row, so only the first of several packed examples would see them",
        "data.packing=false"),
    Row({"adapter.method": VIRTUAL_TOKEN_METHODS, "data.padding_free": True},
        "the virtual tokens stand in front of a row, so only the first of the examples laid end to end would see them",
        "data.padding_free=false, the default for these methods"),
    Row({"adapter.method": "prefix", "train.gradient_checkpointing": True},
        "the prefix is a key-value cache, which gradient checkpointing discards",
        "train.gradient_checkpointing=false"),
    # Quantisation and sharding
    Row({"model.quantization": "int8", "scale.strategy": "zero3"},
        "ZeRO-3 shards int8 weights apart from their scales, and the loss comes out wrong (bitsandbytes 1451)",
        "scale.strategy=zero2, or model.quantization=nf4 with zero2"),
    Row({"model.quantization": ("nf4", "fp4"), "scale.strategy": "zero3"},
        "each worker loads the whole model before it is sharded, and an adapter can be saved empty (DeepSpeed 7900)",
        "scale.strategy=zero2 or ddp"),
    Row({"model.quantization": _BNB, "scale.strategy": "fsdp"},
        "FSDP shards tensors of one number format, and quantised weights are bytes beside floating-point scales",
        "scale.strategy=ddp or zero2"),
    Row({"scale.strategy": "fsdp", "scale.device": "cpu"},
        "accelerate has no FSDP on CPU and would run DDP without a word",
        "scale.strategy=ddp, or zero2"),
    Row({"scale.offload": True, "scale.strategy": ("ddp", "fsdp")},
        "only ZeRO moves its state to host memory",
        "scale.offload=false, or scale.strategy=zero2"),
    # AdaLoRA
    Row({"adapter.method": "adalora", "scale.strategy": _SHARDED},
        "its importance scores read whole gradients after each step, and sharding frees them before",
        "scale.strategy=ddp, or adapter.method=lora"),
    # Initialisation of LoRA
    Row({"adapter.init_lora_weights": "loftq", "model.quantization": NOT_SET},
        "LoftQ starts the adapter at the error of 4-bit weights, and this base has none",
        "model.quantization=nf4"),
    Row({"adapter.init_lora_weights": "loftq", "model.quantization": "int8"},
        "LoftQ starts the adapter at the error of 4-bit weights, and these are 8-bit",
        "model.quantization=nf4"),
    Row({"adapter.init_lora_weights": ("pissa", "olora"), "model.quantization": SET},
        "the base is quantised anew without its main directions, and the saved adapter would not fit the stock base",
        "model.quantization=null, or adapter.init_lora_weights=true"),
    Row({"adapter.method": ("adalora", "p_tuning"), "adapter.init_from": SET},
        "they save what inference needs, which is not all that training needs",
        "another adapter.method, or --resume for a run that was interrupted"),
    Row({"adapter.use_dora": True, "model.quantization": "int8", "scale.device": "cpu"},
        "on a CPU PEFT loses the scales of the int8 weights after the first step",
        "model.quantization=nf4"),
    Row({"adapter.method": ("ia3", "oft", *VIRTUAL_TOKEN_METHODS), "model.add_tokens": SET},
        "PEFT trains single rows of the embedding beside LoRA only",
        "adapter.method=lora or adalora, or no adapter section"),
    Row({"adapter.init_lora_weights": "not default", "adapter.init_from": SET},
        "the adapter starts from the given one, so an initialisation would be thrown away",
        "adapter.init_lora_weights=true"),
    Row({"adapter.init_lora_weights": "orthogonal", "adapter.rank": "odd"},
        "the orthogonal initialisation splits the rank in two halves", "an even adapter.rank"),
    # Objective and data
    Row({"train.objective": "clm", "data.train_on": ("assistant", "last_assistant")},
        "continued pre-training trains on every token", "data.train_on=all, or train.objective=sft"),
    Row({"train.early_stopping_patience": SET, "data.validation": NOT_SET},
        "early stopping watches the validation loss", "data.validation=0.1"),
    Row({"train.load_best_model_at_end": SET, "data.validation": NOT_SET},
        "the best checkpoint is the one with the lowest validation loss", "data.validation=0.1"),
    Row({"train.eval_steps": SET, "data.validation": NOT_SET},
        "there is nothing to evaluate on", "data.validation=0.1"),
    Row({"train.dataloader_prefetch_factor": SET, "train.dataloader_num_workers": NOT_SET},
        "only loader workers prefetch", "train.dataloader_num_workers=2"),
    # Kernels and number formats
    Row({"model.attn_implementation": "flash_attention_2", "model.dtype": "fp32"},
        "flash attention computes in bf16 or fp16 only", "model.dtype=bf16, or model.attn_implementation=sdpa"),
    Row({"model.attn_implementation": "flash_attention_2", "scale.device": "cpu"}, _GPU_ONLY,
        "model.attn_implementation=sdpa"),
    Row({"model.dtype": "fp16", "scale.device": "cpu"},
        "fp16 training scales the loss on a GPU", "model.dtype=bf16 or fp32"),
    Row({"train.use_liger_kernel": True, "scale.device": "cpu"}, f"its kernels are written in Triton and {_GPU_ONLY}",
        "train.use_liger_kernel=false"),
    # Works by the libraries' own account, but no test of ours has run it
    Row({"scale.strategy": "fsdp"}, "accelerate's FSDP runs on accelerators only", verdict="unverified"),
    Row({"model.quantization": SET, "scale.strategy": ("zero1", "zero2")},
        "tested on CPU with gloo; NCCL is not", verdict="unverified"),
    Row({"adapter.use_dora": True, "model.quantization": SET, "scale.strategy": "zero2"},
        "users of PEFT report trouble with it", verdict="unverified"),
    Row({"model.dtype": "fp16"}, "the loss scaler works on a GPU", verdict="unverified"),
    Row({"model.attn_implementation": "flash_attention_2"}, _GPU_ONLY, verdict="unverified"),
    Row({"train.use_liger_kernel": True}, _GPU_ONLY, verdict="unverified"),
)  # fmt: skip

_LORA_ONLY = ("use_rslora", "use_dora", "bias", "init_lora_weights", "loraplus_lr_ratio")
_LOW_RANK = ("rank", "alpha", "dropout")
_MODULES = ("target_modules", "modules_to_save")

UNUSED: dict[str, tuple[str, ...]] = {
    "lora": ("num_virtual_tokens",),
    "adalora": ("num_virtual_tokens", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    "ia3": ("num_virtual_tokens", *_LOW_RANK, *_LORA_ONLY),
    "oft": ("num_virtual_tokens", "alpha", *_LORA_ONLY),
    "prefix": (*_LOW_RANK, *_LORA_ONLY, *_MODULES),
    "prompt": (*_LOW_RANK, *_LORA_ONLY, *_MODULES),
    "p_tuning": (*_LOW_RANK, *_LORA_ONLY, *_MODULES),
}
"""Keys of `adapter:` that a method has no use for. Giving them another value than the default is refused."""


def check(recipe: Recipe, device: Literal["auto", "cpu", "gpu"] | None = None) -> None:
    """Refuse what does not go together.

    `device` replaces `scale.device` once it is known where the workers will run. The recipe must be resolved: a method
    with virtual tokens has no padding-free rows by default.

    Raises UsageError R107 (combination), R108 (passed-through argument), or R100 with all of them.
    """
    facts = facts_of(recipe)
    if device is not None:
        facts["scale.device"] = device
    problems = [Problem("R107", _text(row, recipe)) for row in TABLE if row.verdict == "refused" and row.applies(facts)]
    if recipe.adapter is not None:
        problems += [Problem("R107", text) for text in _unused(recipe.adapter)]
    peft_args = recipe.adapter.peft_args if recipe.adapter else {}
    problems += [Problem("R108", text) for text in refusals(recipe.train.trainer_args, peft_args)]
    refuse(problems)


def unverified(recipe: Recipe) -> list[str]:
    """Sentences about combinations of this recipe that no test of ours has run; empty when there are none."""
    facts = facts_of(recipe)
    return [_text(row, recipe) for row in TABLE if row.verdict == "unverified" and row.applies(facts)]


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """What the conditions of a row look at: every value by dotted path, and some in a coarser form."""
    facts = dict(leaves(recipe.model_dump(mode="json")))
    facts["adapter"] = recipe.adapter.method if recipe.adapter else None
    facts["data.validation"] = recipe.data.validation is not None
    trainable = recipe.train.trainable
    facts["train.trainable"] = "phases" if isinstance(trainable, list) else None if trainable is None else "weights"
    if recipe.adapter is not None and isinstance(recipe.adapter.init_lora_weights, str):
        facts["adapter.init_lora_weights"] = recipe.adapter.init_lora_weights.split("_niter_")[0]
    return facts


def _holds(value: Any, condition: Condition) -> bool:
    if condition == SET:
        return bool(value)
    if condition == NOT_SET:
        return not value
    if condition == "odd":
        return isinstance(value, int) and value % 2 == 1
    if condition == "not default":
        return value is not None and value is not True
    # `1 == True` in Python, but not in a recipe
    choices = condition if isinstance(condition, tuple) else (condition,)
    return any(value == choice and type(value) is type(choice) for choice in choices)


def _text(row: Row, recipe: Recipe) -> str:
    plain = recipe.model_dump(mode="json")
    instead = f" Instead: {row.instead}." if row.instead else ""
    return f"{' with '.join(_shown(plain, key) for key in row.when)}: {row.reason}.{instead}"


def _shown(plain: Any, key: str) -> str:
    """`key=value` as in the recipe, and the bare key for a whole section."""
    value = plain
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else None
    if isinstance(value, dict | list):
        return f"an {key} section" if key == "adapter" else key
    return f"no {key}" if value is None else f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _unused(adapter: Adapter) -> list[str]:
    """Keys of the adapter section that its method would ignore in silence."""
    found = []
    for key in UNUSED[adapter.method]:
        value, default = getattr(adapter, key), Adapter.model_fields[key].get_default(call_default_factory=True)
        if value != default:
            found.append(
                f"adapter.{key}={json.dumps(value)} with adapter.method={adapter.method}: "
                f"this method has no such setting. Instead: remove the key."
            )
    return found
