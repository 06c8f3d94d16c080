"""The lengths of adapted weights, of every form in which a base has its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rayft.models.prepack import packable, prepack
from rayft.multilora import lengths


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, dtype=torch.bfloat16 if kind in ("bf16", "packed") else torch.float32)
    if kind == "packed":
        if not packable(plain.weight):
            pytest.skip("this CPU does not multiply bf16")
        prepack(plain)
        assert plain.weight.is_mkldnn
    elif kind == "nf4":
        from bitsandbytes.nn import Linear4bit

        four = Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4", quant_storage=torch.uint8)
        four.support_avx512bf16_for_cpu = False
        four.load_state_dict(plain.state_dict())
        return four.to("cpu").eval()
    elif kind == "int8":
        from bitsandbytes.nn import Linear8bitLt

        eight = Linear8bitLt(64, 96, has_fp16_weights=False)
        eight.load_state_dict(plain.state_dict())
        return eight.to("cpu").eval()
    return plain.eval()


@torch.no_grad()
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "packed", "nf4", "int8"])
def test_lengths_are_those_of_what_the_layer_multiplies_with(
    kind: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer: Any = layer_of(kind)
    dtype = torch.bfloat16 if kind in ("bf16", "packed") else torch.float32
    if used:
        layer(torch.randn(3, 64, dtype=dtype))
    A, B = torch.randn(4, 64), torch.randn(96, 4)
    monkeypatch.setattr(lengths, "BLOCK", 64 * 10)  # several blocks, the last one shorter
    found = lengths.of_rows(layer, A, B)
    weight = (layer(torch.eye(64, dtype=dtype)) - layer(torch.zeros(1, 64, dtype=dtype))).t().float()
    tolerance = {"fp32": 1e-5, "nf4": 1e-5}.get(kind, 1e-2)  # the others round what they give
    torch.testing.assert_close(found, (weight + B @ A).norm(dim=1), rtol=tolerance, atol=0)
    torch.testing.assert_close(lengths.dense(layer).float(), weight, rtol=0, atol=tolerance)


def test_lengths_of_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = nn.Embedding(50, 16)
    A, B = torch.randn(50, 3), torch.randn(16, 3)
    monkeypatch.setattr(lengths, "BLOCK", 16 * 7)
    with torch.no_grad():
        torch.testing.assert_close(
            lengths.of_columns(embedding, A, B), (embedding.weight + A @ B.t()).norm(dim=0), rtol=1e-5, atol=0
        )
