"""Which recipes can be trained in a pack, and which of them in the same one. Reads recipes only."""

from __future__ import annotations

from typing import Any

from rayft.config.compatibility import NOT_SET, SET, Row, facts_of
from rayft.config.recipe import Recipe

PEFT_ARGS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules")
"""Those that only choose layers and sizes."""
TRAINER_ARGS = ("adam_beta1", "adam_beta2", "adam_epsilon")
WHOLE_MODEL_OPTIMISERS = ("galore", "apollo", "lomo", "grokadamw", "schedule_free", "stable_adamw")

TABLE: tuple[Row, ...] = (
    Row({"adapter": NOT_SET}, "the weights themselves are trained, and a pack shares them"),
    Row({"adapter": ("adalora", "ia3", "oft", "prefix", "prompt", "p_tuning")}, "a pack trains LoRA adapters"),
    Row({"adapter.use_dora": True}, "DoRA divides by the length of the base's weight columns"),
    Row({"adapter.bias": ("all", "lora_only")}, "biases of the base would be trained, and a pack shares them"),
    Row({"adapter.modules_to_save": SET}, "whole modules of the base would be trained, and a pack shares them"),
    Row({"adapter.init_lora_weights": ("pissa", "olora")}, "this start changes the base's weights"),
    Row({"adapter.peft_args": SET}, f"a pack knows {', '.join(PEFT_ARGS)} only"),
    Row({"model.quantization": "int8"}, "a pack computes on fp32, bf16 and 4-bit weights"),
    Row({"model.dtype": "fp16"}, "its loss scale is one number for the whole model"),
    Row({"model.add_tokens": SET}, "rows of the embedding would be trained, and a pack shares them"),
    Row({"data.padding_free": False}, "a pack lays its rows end to end"),
    Row({"scale.strategy": ("zero1", "zero2", "zero3", "fsdp")}, "a pack has the whole base on each device"),
    Row({"train.torch_compile": True}, "each pass of a pack has another shape and would be compiled anew"),
    Row({"train.lr_scheduler_type": ("reduce_lr_on_plateau", "greedy")}, "this schedule looks at evaluations"),
    Row({"train.optim": WHOLE_MODEL_OPTIMISERS}, "this optimiser is built for one whole model"),
    Row({"train.trainer_args": SET}, f"a pack knows {', '.join(TRAINER_ARGS)} only"),
    Row({"train.early_stopping_patience": SET}, "a run that ends by its own rule keeps checkpoints of its own"),
    Row({"train.load_best_model_at_end": True}, "a run that goes back to its best step keeps checkpoints of its own"),
    Row({"train.on_divergence": "rollback"}, "going back to a checkpoint is done by `rayft train`"),
)

SHARED = (
    "model",
    "data.chat_template",
    "data.chat_template_kwargs",
    "train.gradient_checkpointing",
    "train.loss_function",
    "train.use_liger_kernel",
    "train.tf32",
    "scale.device",
)
"""What belongs to the base model, its tokenizer or the pass through it: equal for all adapters of a pack."""


def why_not(recipe: Recipe) -> str | None:
    """Why this recipe cannot be trained in a pack, as ``key: reason``; None when it can."""
    facts = facts_of(recipe) | {
        "adapter.peft_args": recipe.adapter is not None and sorted({*recipe.adapter.peft_args} - {*PEFT_ARGS}),
        "adapter.modules_to_save": recipe.adapter is not None and recipe.adapter.modules_to_save,
        "model.add_tokens": recipe.model.add_tokens,
        "train.trainer_args": sorted({*recipe.train.trainer_args} - {*TRAINER_ARGS}),
        "train.optim": next((name for name in WHOLE_MODEL_OPTIMISERS if name in recipe.train.optim), None),
    }
    return next((f"{', '.join(row.when)}: {row.reason}" for row in TABLE if row.applies(facts)), None)


def differs(recipe: Recipe, other: Recipe) -> str | None:
    """Why two recipes that each suit a pack cannot share one, as ``key: reason``; None when they can."""
    one, two = recipe.model_dump(mode="json"), other.model_dump(mode="json")
    for path in SHARED:
        if _at(one, path) != _at(two, path):
            return f"{path}: the adapters of a pack share one base model and one tokenizer"
    return None


def _at(plain: Any, path: str) -> Any:
    for key in path.split("."):
        plain = plain[key]
    return plain
