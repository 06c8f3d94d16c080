"""The sum over chunks against the same sum in one piece."""

from __future__ import annotations

import torch

from rayft.objectives.chunks import summed_over_chunks
from rayft.objectives.cross_entropy import weighted_cross_entropy


def test_bfloat16_gradients_are_scaled_in_float32() -> None:
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets, weights = torch.zeros(64, dtype=torch.long), torch.ones(64)
    factor = torch.tensor(1 / 613)  # its neighbours in bf16 are 1/612.5 and 1/615.4
    (whole,) = torch.autograd.grad(weighted_cross_entropy(hidden.float(), targets, weights), hidden)
    loss = summed_over_chunks(weighted_cross_entropy, hidden, targets, weights, [], 10)
    (scaled,) = torch.autograd.grad(loss * factor, hidden)
    ratio = (scaled.double() * whole.double()).sum() / whole.double().square().sum()
    torch.testing.assert_close(ratio.item(), factor.item(), rtol=3e-4, atol=0)


def test_weights_of_parameters_add_up_over_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Parameter(torch.randn(7, 16, generator=generator))
    hidden = torch.randn(20, 16, generator=generator, requires_grad=True)
    targets, weights = torch.arange(20) % 7, torch.rand(20, generator=generator)

    def loss_of(rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weighted_cross_entropy(rows @ head.T, targets, weights)

    expected = torch.autograd.grad(loss_of(hidden, targets, weights), (hidden, head))
    ours = torch.autograd.grad(summed_over_chunks(loss_of, hidden, targets, weights, [head], 6), (hidden, head))
    torch.testing.assert_close(ours, expected)
