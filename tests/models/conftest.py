"""What the tests of this room share: a recipe on a tiny model, and a few steps of plain PyTorch training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rayft.config.recipe import Recipe
from rayft.models import load


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """``make_recipe(folder, adapter={...}, model={...}, train={...})``: fp32 and seed 17 unless said otherwise."""

    def make(folder: str, **sections: Any) -> Recipe:
        sections["model"] = {"base": folder, "dtype": "fp32"} | sections.get("model", {})
        sections["train"] = {"learning_rate": 1e-2} | sections.get("train", {})
        return Recipe.model_validate({"data": {"train": "unused.jsonl"}} | sections)

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (2, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture
def train_steps(batch: dict[str, torch.Tensor]) -> Callable[..., list[float]]:
    """``train_steps(model, steps=3, lr=0.003, dtype="fp32")``: SGD on one batch; returns the losses."""

    def run(model: nn.Module, steps: int = 3, lr: float = 0.003, dtype: str = "fp32") -> list[float]:
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        losses = []
        for _ in range(steps):
            with load.compute_context(dtype, "cpu"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def logits_of(batch: dict[str, torch.Tensor]) -> Callable[[nn.Module], torch.Tensor]:
    """Logits [2, 12, V] of the batch's tokens (not of virtual ones before them) in evaluation mode, which is undone."""

    def run(model: nn.Module) -> torch.Tensor:
        training = model.training
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model.train(training)
        return logits[:, -12:].float()

    return run
