"""``train:`` objective, batch, optimiser, schedule and what is watched, named as in transformers' TrainingArguments."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayft.config.choices import IN_BACKWARD, OPTIMISERS, SCHEDULES, require
from rayft.config.section import Section

Tracker = Literal["tensorboard", "mlflow", "wandb"]


class Trainable(Section):
    """Which weights are trained when there is no adapter. Several keys add up."""

    last_blocks: int | None = Field(None, ge=0)
    """The last n transformer blocks, the final norm and the output head."""
    patterns: list[str] = Field(default_factory=list)
    """Regular expressions searched in parameter names."""
    bias: bool = False
    """All bias terms (BitFit, arXiv 2106.10199)."""
    add_bias: bool = False
    """Give linear layers without a bias one that starts at zero; logits are unchanged at the start."""

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if self.last_blocks is None and not self.patterns and not self.bias:
            raise ValueError("no weights would be trained; give last_blocks, patterns or bias")
        if self.add_bias and not self.bias:
            raise ValueError("add_bias gives biases that stay at zero unless bias is true too")
        return self


class Phase(Trainable):
    """One phase of gradual unfreezing: from `start` on, these weights are trained."""

    start: float = Field(0, ge=0)
    """Optimiser step; below 1 a share of all steps."""


class Train(Section):
    objective: Literal["sft", "clm"] = "sft"
    """sft: the supervised tokens of chats; clm: every token (continued pre-training)."""
    epochs: float = Field(1, gt=0)
    """Passes over the training data; a fraction is allowed."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; overrides `epochs`."""
    global_batch_size: int = Field(32, ge=1)
    """Examples (bins with packing) per optimiser step over the whole cluster, whatever the number of workers."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Examples per forward pass on one device. Halves on out-of-memory; the result stays the same."""
    learning_rate: float | None = Field(None, gt=0)
    """Default 2e-4 with an adapter, 1e-5 without."""
    optim: str = "adamw_torch"
    """Any `optim` of transformers, such as adamw_torch_fused, adamw_bnb_8bit, paged_adamw_8bit, adafactor, sgd."""
    optim_args: str | None = None
    """Arguments of the optimiser: `key=value,key=value`."""
    lr_scheduler_type: str = "cosine"
    """Any `lr_scheduler_type` of transformers: linear, constant, cosine_with_restarts, cosine_with_min_lr, ...."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the schedule, such as `{min_lr_rate: 0.1}` or `{num_cycles: 3}`."""
    warmup_steps: float = Field(0.03, ge=0)
    """Optimiser steps with a rising learning rate; below 1 a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; biases and norms are left out."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the gradient's norm; 0 = no clipping."""
    trainable: Trainable | list[Phase] | None = None
    """Which weights, or phases of them (gradual unfreezing). Null = all weights. Not with an adapter."""
    l2_sp: float = Field(0.0, ge=0)
    """Pull of full fine-tuning towards the start weights: adds l2_sp / 2 * |w - w0|^2 (arXiv 1802.01483)."""
    loss_function: str | None = None
    """`package.module:function` or `file.py:function`.
    Takes (logits[N,V], targets[N], weights[N]) and returns the sum of the weighted token losses."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same numbers."""
    torch_compile: bool = False
    """Compile the model with torch.compile."""
    use_liger_kernel: bool = False
    """Triton kernels of the package liger-kernel, where it is installed; needs a GPU."""
    tf32: bool = True
    """Allow TF32 matmuls in fp32 on NVIDIA GPUs."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Processes that read examples ahead, per training process; 0 reads in the training process."""
    dataloader_prefetch_factor: int | None = Field(None, ge=1)
    """Micro-batches that each of those processes reads ahead. Default: 2."""
    dataloader_pin_memory: bool | None = None
    """Copy through page-locked memory. Default: on a GPU."""
    logging_steps: int = Field(1, ge=1)
    """Optimiser steps between lines of metrics.jsonl."""
    eval_steps: float | None = Field(None, gt=0)
    """Optimiser steps between evaluations; below 1 = share of all steps. Default: once per epoch."""
    save_steps: float | None = Field(None, gt=0)
    """Optimiser steps between checkpoints; below 1 = share of all steps. Default: ten per run."""
    save_total_limit: int | None = Field(3, ge=1)
    """Checkpoints kept; the best and the last are always among them."""
    load_best_model_at_end: bool = False
    """The run's result is the checkpoint of the lowest validation loss, not the last one."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Evaluations without a better validation loss before the run ends."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """A validation loss counts as better when it is lower by more than this."""
    on_divergence: Literal["stop", "rollback", "warn"] = "stop"
    """NaN, inf or an exploding loss: end the run; go back to the last good checkpoint with half the rate; or go on."""
    report_to: list[Tracker] = Field(default_factory=lambda: list[Tracker](["tensorboard"]))
    """Where scalars go besides metrics.jsonl; `[]` for nowhere."""
    trainer_args: dict[str, Any] = Field(default_factory=dict)
    """Any further field of `transformers.TrainingArguments`; fields that would break a promise are refused by name."""

    @field_validator("optim")
    @classmethod
    def _known_optimiser(cls, value: str) -> str:
        if value in IN_BACKWARD:
            raise ValueError("it steps inside the backward pass, before the gradient of the global batch is complete")
        return require(value, OPTIMISERS)

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return require(value, SCHEDULES)

    @field_validator("micro_batch_size")
    @classmethod
    def _at_least_one(cls, value: object) -> object:
        if isinstance(value, int) and value < 1:
            raise ValueError("a micro batch is 1 or more, or auto")
        return value

    @field_validator("trainable")
    @classmethod
    def _phases_in_order(cls, value: object) -> object:
        if isinstance(value, list):
            starts = [phase.start for phase in value]
            if not starts or starts[0] != 0 or starts != sorted(set(starts)):
                raise ValueError("phases start at 0 and each later than the one before")
        return value
