"""Arguments that may not pass through `train.trainer_args` and `adapter.peft_args`, because they would break a promise.

Everything else passes. Whether such a name exists at all is checked against the library's own signature where the
library is imported anyway: `check_names` is for that place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from rayft.config.adapter import Adapter
from rayft.config.synonyms import synonym
from rayft.config.train import Train
from rayft.errors import UsageError

_ORDER = "the examples of a step follow from the seed and train.global_batch_size alone"
_NORMALISER = "the loss is divided by the sum of weights over the global step"
_RESUME = "a resumed run must continue the uninterrupted one exactly"
_FOLDER = "the run folder decides where and when files are written"
_DRIVER = "rayft reports progress from the driver"
_PLACEMENT = "Ray places the workers and scale.strategy sets up their process group"

REFUSED: dict[str, str] = {
    "per_device_train_batch_size": _ORDER,
    "per_device_eval_batch_size": _ORDER,
    "gradient_accumulation_steps": _ORDER,
    "auto_find_batch_size": "the micro batch halves on out-of-memory without changing the result",
    "group_by_length": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_drop_last": "a ragged last step is filled with zero-weight rows, nothing is dropped",
    "dataloader_in_order": _ORDER,
    "accelerator_config": _ORDER,
    "parallelism_config": _PLACEMENT,
    "remove_unused_columns": "the loss weights are a column that transformers does not know",
    "label_names": "labels are made inside the objective",
    "label_smoothing_factor": "the loss would no longer be the weighted token loss; use train.loss_function",
    "average_tokens_across_devices": _NORMALISER,
    "include_num_input_tokens_seen": "tokens are counted by rayft: real, padding and supervised apart",
    "prediction_loss_only": "the validation loss never gathers logits",
    "include_for_metrics": "the validation loss never gathers logits",
    "batch_eval_metrics": "the validation loss never gathers logits",
    "eval_accumulation_steps": "the validation loss never gathers logits",
    "eval_do_concat_batches": "the validation loss never gathers logits",
    "eval_use_gather_object": "the validation loss never gathers logits",
    "seed": "one seed decides everything; write seed at the top of the recipe",
    "data_seed": "one seed decides everything; write seed at the top of the recipe",
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "resume_from_checkpoint": "use the option --resume",
    "output_dir": _FOLDER,
    "overwrite_output_dir": "use the option --overwrite",
    "logging_dir": _FOLDER,
    "run_name": "write name at the top of the recipe",
    "save_strategy": _FOLDER,
    "save_only_model": _RESUME,
    "save_on_each_node": _FOLDER,
    "enable_jit_checkpoint": "rayft saves on a preemption notice itself",
    "metric_for_best_model": "the best checkpoint is the one with the lowest validation loss",
    "greater_is_better": "the best checkpoint is the one with the lowest validation loss",
    "eval_strategy": "write train.eval_steps",
    "logging_strategy": "write train.logging_steps",
    "logging_nan_inf_filter": "NaN and inf must be seen; train.on_divergence says what happens then",
    "disable_tqdm": _DRIVER,
    "log_level": _DRIVER,
    "log_level_replica": _DRIVER,
    "log_on_each_node": _DRIVER,
    "push_to_hub": "a run never uploads anything",
    "hub_token": "secrets are never written into a recipe",
    "hub_model_id": "a run never uploads anything",
    "bf16": "write model.dtype: bf16",
    "fp16": "write model.dtype: fp16",
    "bf16_full_eval": "write model.dtype: bf16",
    "fp16_full_eval": "write model.dtype: fp16",
    "use_cpu": "write scale.device: cpu",
    "no_cuda": "write scale.device: cpu",
    "local_rank": _PLACEMENT,
    "deepspeed": "write scale.strategy: zero1, zero2 or zero3",
    "fsdp": "write scale.strategy: fsdp",
    "fsdp_config": "write scale.strategy: fsdp",
    "ddp_backend": _PLACEMENT,
    "full_determinism": "the seed is set by rayft, and some kernels would be replaced silently",
    "do_train": "each verb is a command",
    "do_eval": "each verb is a command",
    "do_predict": "each verb is a command",
    "use_cache": "a key-value cache defeats padding-free rows and gradient checkpointing",
    "num_train_epochs": "write train.epochs",
    "warmup_ratio": "write train.warmup_steps, below 1 it is a share of all steps",
    "activation_checkpointing": "write train.gradient_checkpointing",
}

PEFT_REFUSED: dict[str, str] = {
    "peft_type": "write adapter.method",
    "task_type": "every objective so far trains a causal language model",
    "inference_mode": "an adapter that is trained cannot be frozen",
    "base_model_name_or_path": "write model.base",
    "auto_mapping": "the adapter is saved for the stock loader",
    "r": "write adapter.rank",
    "target_r": "write adapter.rank",
    "lora_alpha": "write adapter.alpha",
    "lora_dropout": "write adapter.dropout",
    "trainable_token_indices": "write model.add_tokens",
    "total_step": "AdaLoRA's schedule follows from the length of the run",
}

_OWN_KEYS = {
    "train.trainer_args": ("train", set(Train.model_fields) - {"trainer_args"}),
    "adapter.peft_args": ("adapter", set(Adapter.model_fields) - {"peft_args"}),
}


def refusals(trainer_args: Mapping[str, Any], peft_args: Mapping[str, Any]) -> list[str]:
    """One sentence for each argument that may not be passed through."""
    found = []
    for where, arguments, refused in (
        ("train.trainer_args", trainer_args, REFUSED),
        ("adapter.peft_args", peft_args, PEFT_REFUSED),
    ):
        section, own = _OWN_KEYS[where]
        for name in arguments:
            if name in own:
                found.append(f"{where}.{name}: rayft has this key itself, write {section}.{name}")
            elif name in refused:
                entry = synonym(name)
                here = f" (here: {entry.here})" if entry and entry.here and entry.here not in refused[name] else ""
                found.append(f"{where}.{name}: refused, {refused[name]}{here}")
    return found


def check_names(where: str, given: Iterable[str], known: Iterable[str], library: str) -> None:
    """Check passed-through names against a library's signature.

    `where` is `train.trainer_args` or `adapter.peft_args`, `library` what the message calls the signature, such as
    `transformers.TrainingArguments`. Raises UsageError R108 that lists every unknown name with its nearest match.
    """
    choices = sorted(known)
    lines = []
    for name in given:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
            meant = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{where}.{name}: {library} has no such argument{meant}")
    if lines:
        raise UsageError("R108", "\n  ".join(lines))
