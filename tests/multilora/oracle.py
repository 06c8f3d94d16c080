"""One adapter alone in stock PEFT and plain PyTorch: what every trial of a pack must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, get_scheduler

from rayft import config
from rayft.config.recipe import Recipe
from rayft.data import Prepared, prepare
from rayft.data.plan import step_plan, worker_share
from rayft.models import load
from rayft.multilora.route import dropout_seed
from tests.train.curves import Curve


@dataclass
class Alone:
    """What a trial did: its curve, its first gradients by PEFT's names, and the model at the end."""

    model: Any
    curve: Curve = field(default_factory=lambda: Curve([], []))
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def prepared(plain: dict[str, Any]) -> tuple[Recipe, Prepared]:
    recipe = config.load(plain).recipe
    tokenizer = load.load_tokenizer(recipe, recipe.model.base)
    return recipe, prepare(recipe, tokenizer, str(Path(recipe.storage, ".cache/data")))


def alone(recipe: Recipe, data: Prepared, steps: int, *, quantization: Any = None) -> Alone:
    """``steps`` optimiser steps of ``recipe``, whose micro-batches hold one example, so that dropout draws for each."""
    adapter, train = recipe.adapter, recipe.train
    assert adapter is not None and train.learning_rate is not None and train.micro_batch_size == 1
    examples = data.split("train")
    assert examples is not None
    base = AutoModelForCausalLM.from_pretrained(recipe.model.base, quantization_config=quantization)
    if quantization is not None:
        load.keep_trainable_on_cpu(base)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha),
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        task_type="CAUSAL_LM",
        **adapter.peft_args,
    )
    run = Alone(get_peft_model(base, config).train())
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(run.model, recipe)
    plan = [part for epoch in range(steps) for part in step_plan(examples.lengths, _batch(recipe), recipe.seed, epoch)]
    total = train.max_steps
    schedule = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=-int(-train.warmup_steps * total // 1) if train.warmup_steps < 1 else int(train.warmup_steps),
        num_training_steps=total,
    )
    for step, indices in enumerate(plan[:steps]):
        weight = sum(float(examples[index]["loss_weights"].astype("float64").sum()) for index in indices)
        loss_of_step = 0.0
        shares = worker_share(indices, examples.lengths, 1, 0, 1, _batch(recipe))
        for micro, share in enumerate(shares):
            row = examples[share[0]]
            ids = torch.from_numpy(row["input_ids"].astype("int64"))[None]
            with _seeded_dropout(run.model, recipe.seed, step * len(shares) + micro):
                logits = run.model(input_ids=ids).logits[0, :-1]
            losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            loss = (losses * torch.from_numpy(row["loss_weights"])[1:]).sum() / weight
            loss.backward()
            loss_of_step += float(loss)
        if step == 0:
            run.first_gradients = {
                name.replace(".default", ""): p.grad.clone()
                for name, p in run.model.named_parameters()
                if p.requires_grad
            }
        trained = [p for p in run.model.parameters() if p.requires_grad]
        run.curve.grad_norms.append(
            float(torch.nn.utils.clip_grad_norm_(trained.values(), train.max_grad_norm or torch.inf))
        )
        run.curve.losses.append(loss_of_step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return run


def _batch(recipe: Recipe) -> int:
    return recipe.train.global_batch_size


def _optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    kind: Any = torch.optim.SGD if recipe.train.optim == "sgd" else torch.optim.AdamW
    ratio = recipe.adapter and recipe.adapter.loraplus_lr_ratio
    settings = {"lr": recipe.train.learning_rate, "weight_decay": recipe.train.weight_decay}
    if ratio:
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.0, **settings)
    return kind([p for p in model.parameters() if p.requires_grad], **settings)


@contextmanager
def _seeded_dropout(model: Any, seed: int, draw: int) -> Iterator[None]:
    """Seed each `lora_dropout` of stock PEFT just before it draws."""
    hooks = []
    for path, module in model.base_model.model.named_modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            number = dropout_seed(seed, draw, path)
            hooks.append(
                dropout.register_forward_pre_hook(lambda *_, number=number: torch.manual_seed(number) and None)
            )
    yield
    for hook in hooks:
        hook.remove()
