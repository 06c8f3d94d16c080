"""Weights laid out for the CPU give the products of `linear`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rayft.models.prepack import Packed, packable, prepack

pytestmark = pytest.mark.skipif(
    not packable(torch.zeros(1, dtype=torch.bfloat16)), reason="this CPU or this PyTorch does not multiply bf16 so"
)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to the last digit of bf16."""
    return torch.allclose(one.float(), other.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_products_are_those_of_linear(rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16()
    x, y = torch.randn(rows, 64).bfloat16(), torch.randn(rows, 96).bfloat16()
    packed = Packed(weight)
    assert close(packed.linear(x), nn.functional.linear(x, weight))
    assert close(packed.linear(x[None], bias), nn.functional.linear(x[None], weight, bias))
    before = y.clone()
    assert close(packed.added(y, x), y + nn.functional.linear(x, weight))
    assert torch.equal(y, before)


def test_only_plain_bf16_layers_are_packed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 64)
            self.block = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
            self.head = nn.Linear(64, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(self.embedding(ids)))

    torch.manual_seed(0)
    model = Tied().bfloat16().requires_grad_(False)
    stock, ids = copy.deepcopy(model), torch.arange(6)
    assert prepack(copy.deepcopy(model).float()) == 0
    assert prepack(model) == 3
    assert model.block[0].weight.is_mkldnn and not model.head.weight.is_mkldnn  # the embedding looks rows up
    assert close(model(ids), stock(ids))
