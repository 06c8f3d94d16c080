"""Layers that read the same tensor give what they gave before, computed together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rayft.models.prepack import packable
from rayft.models.siblings import Siblings, watching, weight_of


class Block(nn.Module):
    """Two layers that read one tensor, one that reads another, and one that reads the first tensor elsewhere."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q, self.v = nn.Linear(32, 32, bias), nn.Linear(32, 16, bias)
        self.o = nn.Linear(16, 32)
        self.inner = nn.ModuleDict({"gate": nn.Linear(32, 32, bias)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v, gate = self.q(x), self.v(x), self.inner["gate"](x)
        return torch.tanh(q) * self.o(v) + gate


def joined(block: Block) -> list[Siblings]:
    with watching(block) as groups, torch.no_grad():
        block(torch.zeros(1, 32, dtype=block.q.weight.dtype))
    return [Siblings(group) for group in groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_they_give_what_they_gave_alone(dtype: torch.dtype, bias: bool) -> None:
    block = Block(bias).to(dtype).eval()
    alone = copy.deepcopy(block)
    groups = joined(block)
    assert [group.names for group in groups] == [("q", "v")]  # neither another module's layer nor another input's
    x = torch.randn(2, 5, 32).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        for ours, stock in ((block, alone), (block.v, alone.v), (block.v, alone.v)):
            torch.testing.assert_close(ours(x), stock(x), **tolerance)
            x = 2 * x
    for name in ("q", "v"):
        weight = weight_of(block.get_submodule(name))
        assert weight is not None and torch.equal(weight, alone.get_submodule(name).weight)
    block.q.forward = block.q.forward.__call__  # adapters lie on a layer  # type: ignore[method-assign]
    assert torch.equal(weight_of(block.q), alone.q.weight)  # type: ignore[arg-type]  # it has one
    assert weight_of(block.o) is None
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in alone.parameters())


def test_one_product_serves_all_and_keeps_no_tensor() -> None:
    block = Block().eval()
    (group,) = joined(block)
    calls: list[torch.Tensor] = []
    wide = group.wide.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return wide(x)

    group.wide.forward = counted  # type: ignore[method-assign]  # for this test
    x = torch.randn(3, 32)
    with torch.no_grad():
        block.q(x), block.v(x)
        assert len(calls) == 1
        assert group._seen is None
        block.q(x), block.q(x)  # a second time is another product
        assert len(calls) == 3
        changed = block.q(x)
        x.add_(1)
        assert not torch.equal(block.v(x), block.v(x - 1)), changed
        torch.testing.assert_close(block.v(x), x @ weight_of(block.v).t())  # type: ignore[union-attr]  # it has one


def test_laid_out_weights_are_not_kept_twice() -> None:
    block = Block().to(torch.bfloat16).eval()
    if not packable(block.q.weight):
        pytest.skip("this CPU multiplies no bf16")
    (group,) = joined(block)
    assert block.q.weight.is_meta and group.wide.weight.is_mkldnn
    assert block.q.weight.shape == (32, 32)


def test_shared_and_replaced_layers_stay_alone() -> None:
    shared: Any = Block()
    shared.v.weight = nn.Parameter(torch.randn(16, 32))
    shared.twin = nn.Linear(32, 16, bias=False)
    shared.twin.weight = shared.v.weight
    assert joined(shared) == []
    replaced = Block()
    replaced.q.forward = replaced.q.forward  # type: ignore[method-assign]  # somebody has put something there
    assert joined(replaced) == []
