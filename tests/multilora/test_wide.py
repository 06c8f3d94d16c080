"""Adapters of siblings as one adapter of the wide layer."""

from __future__ import annotations

import torch

from rayft.multilora.schemes import LoraWeights
from rayft.multilora.wide import widened


def test_the_update_of_each_layer_is_its_own() -> None:
    torch.manual_seed(0)
    outputs = {"q": slice(0, 6), "k": slice(6, 9), "v": slice(9, 12)}
    weights = {
        "v": LoraWeights(torch.randn(2, 5), torch.randn(3, 2), 0.5),
        "q": LoraWeights(torch.randn(4, 5), torch.randn(6, 4), 2.0),
    }
    wide = widened(weights, outputs)
    update = wide.scaling * wide.B @ wide.A
    for name, (A, B, scaling) in weights.items():
        torch.testing.assert_close(update[outputs[name]], scaling * B @ A)
    assert not update[outputs["k"]].any()


def test_a_layer_without_siblings_keeps_its_tensors() -> None:
    alone = LoraWeights(torch.randn(2, 5), torch.randn(3, 2), 0.5)
    assert widened({"o": alone}, {"o": slice(0, 3)}) is alone
