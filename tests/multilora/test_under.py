"""A frozen adapter under all others: part of the base as far as anybody else can tell."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rayft.multilora.linear import attach
from rayft.multilora.route import BASE, Route

MODULE = "model.layers.1.self_attn.q_proj"


def test_it_acts_on_every_row_and_leaves_no_trace(tiny_model_folder: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        bare = model(ids).logits
    draw = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, 64, generator=draw) / 8, torch.randn(64, 3, generator=draw) / 8
    mlora = attach(model)
    own = (torch.randn(2, 64, generator=draw) / 8, torch.randn(64, 2, generator=draw) / 8)
    mlora.add(0, {MODULE: (torch.nn.Parameter(own[0]), torch.nn.Parameter(own[1]), 0.5)})
    mlora.lay_under({MODULE: (A, B)})
    slot = torch.tensor([0] * 6 + [BASE] * 6, dtype=torch.int32)
    with mlora.route(Route(slot)):
        mixed = model(ids).logits
        mixed.sum().backward()
    assert all(weight.grad is not None for weight in mlora._layers[MODULE].weights[0][:2])
    with torch.no_grad():
        alone = model(ids).logits  # without a route: the base and what lies under
        mlora.lay_under({})
        assert torch.equal(model(ids).logits, bare)
        mlora.detach()
        weight = model.get_submodule(MODULE).weight
        weight += B @ A
        merged = model(ids).logits
    assert torch.allclose(alone, merged, rtol=0, atol=1e-5) and not torch.allclose(alone, bare, atol=1e-3)
    assert not torch.allclose(mixed, merged, atol=1e-3), "the rows of slot 0 have their own adapter on top"
