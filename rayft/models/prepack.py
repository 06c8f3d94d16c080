"""Weights laid out once as the CPU's matmul wants them, and not anew for every token.

PyTorch's own `linear` lays a bf16 weight out for oneDNN in every call, which takes as long as the product itself while
a batch is small: SmolLM2's layers took 1.4 to 1.9 times as long with 1 to 32 rows, 1.2 times with 64.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial

import torch
from torch import nn

ROWS = 16
"""The number of rows that a layout is chosen for: a small batch that decodes."""


def packable(weight: torch.Tensor) -> bool:
    """Whether `Packed` takes it: bf16 on a CPU that multiplies it."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and _supported()


class Packed:
    """A weight [out, in] that is only multiplied with. Its products are `linear`s, up to the order of additions."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Raises RuntimeError for a weight that is not `packable`."""
        self.weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        return product

    def added(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``y`` [T, out] and the product of ``x`` [T, in]."""
        total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, self.weight, None, "add")
        return total


def prepack(model: nn.Module) -> int:
    """Lay out the weights of all plain linear layers in bf16 on a CPU; returns how many there were.

    A layer keeps no other copy of its weight, so from then on the model can only be computed with. Where a weight is
    shared, as the output head's often is with the embedding, there are two.
    """
    users = users_of(model)
    layers = [module for module in model.modules() if type(module) is nn.Linear and packable(module.weight)]
    for layer in layers:
        packed = Packed(layer.weight)
        if users[id(layer.weight)] == 1:
            layer.weight = nn.Parameter(packed.weight, requires_grad=False)
        layer.forward = partial(packed.linear, bias=layer.bias)  # type: ignore[method-assign]  # of this layer alone
    return len(layers)


def users_of(model: nn.Module) -> Counter[int]:
    """How many modules have a parameter, by its identity."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


@cache
def _supported() -> bool:
    """Whether this PyTorch and this CPU have the operators, which are not public."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
