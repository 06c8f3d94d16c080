"""Linear layers that read the same tensor, such as a query, its key and its value, computed in one wide product.

One call costs less than three: with 16 rows SmolLM2's layers take 0.57 of their time so (2 CPU cores, bf16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from rayft.models.prepack import prepack, users_of

_KEY = "_rayft_part"
"""The attribute of a layer that says which part of which siblings it is; its ``forward`` may be replaced again."""


class Siblings:
    """Layers of one model whose ``forward`` is a part of what a wide layer gives, from then on.

    The wide one computes when the first of them is called, and the others take their parts: they must be called with
    the same tensor, as they were when they were found; a layer that is called with another one is still right, but
    slower. The wide layer is no module of the model. Where it is laid out for a CPU (see `prepack`), the layers keep no
    weights of their own but their shapes: `weight_of` gives what they had.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        """layers: at least two by name, with inputs, dtype, device alike, and all or none with a bias."""
        self.names = tuple(layers)
        members = list(layers.values())
        self._widths = [layer.out_features for layer in members]
        first, width = members[0], sum(self._widths)
        self.wide = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
        self.wide.train(first.training)
        self.wide.weight = _joined([layer.weight for layer in members])
        if first.bias is not None:
            self.wide.bias = _joined([layer.bias for layer in members])
        self._parts: list[torch.Tensor | None] = [None] * len(members)
        self._seen: tuple[torch.Tensor, int] | None = None
        weights = self.wide.weight.detach().split(self._widths)
        laid_out = prepack(self.wide) > 0
        for index, layer in enumerate(members):
            own = weights[index].to("meta") if laid_out else weights[index]
            layer.weight = nn.Parameter(own, requires_grad=False)
            part = vars(layer)[_KEY] = _Part(self, index)
            layer.forward = part  # type: ignore[method-assign,assignment]  # of this layer alone

    def rows(self, index: int) -> slice:
        """Which outputs of the wide layer are those of a layer."""
        start = sum(self._widths[:index])
        return slice(start, start + self._widths[index])

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out of one layer]."""
        seen, part = self._seen, self._parts[index]
        if part is None or seen is None or seen[0] is not x or seen[1] != x._version:
            self._seen = x, x._version
            self._parts = [*self.wide(x).split(self._widths, -1)]
            part = self._parts[index]
            assert part is not None
        self._parts[index] = None
        if not any(other is not None for other in self._parts):
            self._seen = None
        return part


class _Part:
    """The ``forward`` of one of several siblings. It can be copied with its layer, unlike a bound method."""

    def __init__(self, siblings: Siblings, index: int) -> None:
        self.siblings, self.index = siblings, index

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.part(self.index, x)


@contextmanager
def watching(model: nn.Module) -> Iterator[list[dict[str, nn.Linear]]]:
    """A list that has, after a forward pass inside, the plain linear layers that can be `Siblings`, by name."""
    names = {module: name for name, module in model.named_modules() if type(module) is nn.Linear}
    calls: list[tuple[torch.Tensor, nn.Linear]] = []
    found: list[dict[str, nn.Linear]] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append((inputs[0], layer))  # keeps the tensor, so that no other one gets its identity

    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[object, ...], dict[str, nn.Linear]] = {}
    for x, layer in calls:
        weight = layer.weight
        kind = weight.dtype, weight.device, layer.bias is None, names[layer].rpartition(".")[0]
        groups.setdefault((id(x), *kind), {})[names[layer]] = layer
    users = users_of(model)
    for group in groups.values():
        alone = all(users[id(layer.weight)] == 1 and "forward" not in vars(layer) for layer in group.values())
        if len(group) > 1 and alone:
            found.append(group)


def weight_of(layer: nn.Module) -> torch.Tensor | None:
    """[out, in]: the weight that one of several siblings had, as it is stored now; None for other layers."""
    part: _Part | None = vars(layer).get(_KEY)
    if part is None:
        return None
    wide = part.siblings.wide.weight.detach()
    return (wide.to_dense() if wide.is_mkldnn else wide)[part.siblings.rows(part.index)]


def _joined(parameters: Sequence[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter.detach() for parameter in parameters]), requires_grad=False)
