"""Curves of runs and how close two of them must be (DESIGN: losses to 2e-6, gradient norms to 1e-5 relative)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, get_scheduler, set_seed

from rayft.data import Prepared
from rayft.data.plan import step_plan
from rayft.runs.folder import RunFolder


@dataclass(frozen=True)
class Curve:
    losses: list[float]
    grad_norms: list[float]


def curve_of(path: str) -> Curve:
    """The training curve of a run, from its metrics.jsonl."""
    rows = [row for row in RunFolder.open(path).metrics() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing or stands there twice"
    return Curve([row["loss"] for row in rows], [row["grad_norm"] for row in rows])


def assert_same(one: Curve, other: Curve, loss: float = 2e-6, norm: float = 1e-5) -> None:
    assert len(one.losses) == len(other.losses) > 0
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=0, atol=loss)
    torch.testing.assert_close(torch.tensor(one.grad_norms), torch.tensor(other.grad_norms), rtol=norm, atol=1e-7)


def plain_loop(recipe: dict[str, Any], prepared: Prepared, adapt: Any, steps: int) -> Curve:
    """The same run without rayft's trainer: stock model, one example at a time, stock logits, a plain sum.

    `adapt` turns the stock model into the one that is trained.
    """
    train = recipe["train"]
    set_seed(recipe.get("seed", 17))
    model = adapt(AutoModelForCausalLM.from_pretrained(recipe["model"]["base"]))
    model.train()
    examples = prepared.split("train")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = torch.optim.SGD if train.get("optim") == "sgd" else torch.optim.AdamW
    optimizer = kind(trained, lr=train["learning_rate"], weight_decay=0.0)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=round(-(-0.03 * steps // 1)), num_training_steps=steps
    )
    losses, norms = [], []
    for step in range(steps):
        plans = step_plan(
            examples.lengths, train["global_batch_size"], recipe.get("seed", 17), step // _per_epoch(recipe, examples)
        )
        indices = plans[step % len(plans)]
        total = sum(float(examples[index]["loss_weights"].astype("float64").sum()) for index in indices)
        loss_of_step = 0.0
        for index in indices:
            ids = torch.from_numpy(examples[index]["input_ids"].astype("int64"))[None]
            weights = torch.from_numpy(examples[index]["loss_weights"])
            logits = model(input_ids=ids).logits[0, :-1]
            token_losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            loss = (token_losses * weights[1:]).sum() / total
            loss.backward()
            loss_of_step += float(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        losses.append(loss_of_step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Curve(losses, norms)


def _per_epoch(recipe: dict[str, Any], examples: Any) -> int:
    return -(-len(examples) // recipe["train"]["global_batch_size"])
