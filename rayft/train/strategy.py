"""How the weights and the optimiser are spread: DDP, ZeRO or FSDP, as arguments of the Hugging Face Trainer."""

from __future__ import annotations

import os
from typing import Any, get_type_hints

import torch.distributed as dist
from pydantic import TypeAdapter
from transformers import TrainingArguments

from rayft.config.recipe import Recipe
from rayft.data.schedule import StepSchedule
from rayft.errors import UsageError
from rayft.models.optimizer import optimizer_settings

ZERO_STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}


def training_arguments(
    recipe: Recipe,
    schedule: StepSchedule,
    *,
    folder: str,
    dtype: str,
    device: str,
    micro_batch_size: int,
    micro_steps: int,
    validation: bool,
    universal: bool = False,
) -> TrainingArguments:
    """The Trainer's arguments for one worker.

    folder: local scratch of this worker. dtype: "bf16", "fp16" or "fp32", resolved. device: "cpu" or "gpu".
    universal: a ZeRO checkpoint of another number of workers, converted, is about to be loaded.
    """
    train = recipe.train
    zero = ZERO_STAGE.get(recipe.scale.strategy)
    arguments: dict[str, Any] = optimizer_settings(recipe) | {
        "output_dir": folder,
        "seed": recipe.seed,
        "max_steps": schedule.total_steps,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": micro_steps,
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "activation_checkpointing": train.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "torch_compile": train.torch_compile,
        "tf32": train.tf32 if device == "gpu" else None,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # a NaN is what the watch looks for
        "eval_strategy": "steps" if validation else "no",
        "eval_steps": schedule.every(train.eval_steps, schedule.steps_per_epoch) if validation else None,
        "metric_for_best_model": "loss" if validation else None,
        "greater_is_better": False if validation else None,
        "save_strategy": "steps",
        "save_steps": schedule.every(train.save_steps, schedule.total_steps // 10),
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device == "cpu" and zero is None,
        "ddp_find_unused_parameters": isinstance(train.trainable, list),  # phases leave weights without gradient
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    if zero is not None:
        arguments["deepspeed"] = deepspeed_config(zero, offload=recipe.scale.offload, dtype=dtype, universal=universal)
    if recipe.scale.strategy == "fsdp":
        arguments |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    built = TrainingArguments(**(arguments | train.trainer_args))
    if zero is not None and device == "cpu":
        _count_processes(built)
    return built


def check_trainer_args(recipe: Recipe) -> None:
    """Raise UsageError R610 for a name or value in `train.trainer_args` that transformers does not take."""
    given = recipe.train.trainer_args
    types = get_type_hints(TrainingArguments)
    if unknown := sorted(set(given) - set(types)):
        raise UsageError(
            "R610", f"train.trainer_args: transformers.TrainingArguments has no field {', '.join(unknown)}"
        )
    try:
        for name, value in given.items():
            TypeAdapter(types[name]).validate_python(value)
        TrainingArguments(**{"output_dir": "unused", "use_cpu": True} | given)
    except (TypeError, ValueError) as error:
        raise UsageError("R610", f"train.trainer_args: transformers refuses {given}: {error}") from error


def _count_processes(arguments: TrainingArguments) -> None:
    """Tell accelerate how many processes there are: with DeepSpeed and no accelerator it takes itself for the only one,
    so every rank would save, and losses would not be gathered."""
    if dist.is_initialized():
        state = arguments.distributed_state
        state.backend = dist.get_backend()
        state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
        state.local_process_index = int(os.environ["LOCAL_RANK"])


def deepspeed_config(stage: int, *, offload: bool, dtype: str, universal: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" values are filled in by transformers from the arguments above."""
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if offload:
        zero["offload_optimizer"] = host
        if stage == 3:
            zero["offload_param"] = host
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_allow_untested_optimizer": True,
        # Every worker keeps its shards in its own scratch folder; the report merges them in storage.
        "checkpoint": {"use_node_local_storage": True, "load_universal": universal},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
