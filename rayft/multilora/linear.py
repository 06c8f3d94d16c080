"""The linear layers of one base model, shared by several LoRA adapters of different rank, alpha, dropout and targets.

    mlora = attach(model)
    mlora.add(0, {"model.layers.0.self_attn.q_proj": (A, B, scaling), ...})
    with mlora.route(Route(slot)):            # slot int32[T]: the adapter of each row, -1 for none
        loss = model(...).loss
        loss.backward()                       # inside: gradient checkpointing runs the layers again

The base stays as it is: names, weights and state dict do not change, only the layers' ``forward`` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rayft.models import peft_config
from rayft.models.siblings import Siblings
from rayft.multilora.overlay import Overlays
from rayft.multilora.own import Own
from rayft.multilora.route import Route, dropout_seed
from rayft.multilora.schemes import SCHEMES, LoraWeights, Together, cheapest
from rayft.multilora.wide import widened


@dataclass(frozen=True)
class _Dropout:
    probability: float
    seed: int


class MultiLora:
    """The adapters of one model by slot, and the route that the current forward pass takes. See `attach`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, nn.Module],
        scheme: str = "auto",
        siblings: Sequence[Siblings] = (),
    ) -> None:
        if scheme != "auto" and scheme not in SCHEMES:
            raise ValueError(f"scheme is auto, {', '.join(SCHEMES)}; not {scheme}")
        self.scheme = scheme
        self._current: Route | None = None
        self._layers: dict[str, _Layer] = {}
        """By the name of a module; siblings have one between them."""
        for group in siblings:
            outputs = {name: group.rows(index) for index, name in enumerate(group.names)}
            self._layers |= dict.fromkeys(outputs, _Layer(" + ".join(outputs), group.wide, self, outputs))
        for name in layers.keys() - self._layers.keys():
            self._layers[name] = _Layer(name, layers[name], self, {name: slice(0, layers[name].out_features)})
        self._dropouts: dict[int, _Dropout] = {}
        self.overlays = Overlays(model, {name: (layer, layer.outputs[name]) for name, layer in self._layers.items()})
        """What adapters do beside the matmuls that they share."""

    @property
    def modules(self) -> frozenset[str]:
        """Names of the layers that an adapter may have."""
        return frozenset(self._layers)

    @property
    def slots(self) -> frozenset[int]:
        return frozenset(self._dropouts)

    def device_of(self, module: str) -> torch.device:
        shared = self._layers.get(module)
        return next((self.overlays.modules[module] if shared is None else shared.module).parameters()).device

    def add(
        self,
        slot: int,
        weights: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
        *,
        dropout: float = 0.0,
        seed: int = 0,
        own: Mapping[str, Sequence[Own]] | None = None,
    ) -> None:
        """Put an adapter into a free slot >= 0.

        weights: by module name, (A [rank, in], B [out, rank], scaling); the rank may differ between modules. Tensors
        are taken as they are: parameters are trained, plain ones only applied. dropout: probability for its input, in
        training mode; its masks depend on ``seed``, the route's step and the module, and on nothing else. own: what
        else it does, by the name of any module of the model; only applied, not trained.

        Raises:
            ValueError: a slot in use or negative, an unknown module, or a shape that does not fit it.
        """
        if slot in self._dropouts or slot < 0:
            raise ValueError(f"slot {slot} is in use" if slot >= 0 else f"slot {slot} is negative")
        by_layer: defaultdict[_Layer, dict[str, LoraWeights]] = defaultdict(dict)
        for name, (A, B, factor) in weights.items():
            if name not in self._layers:
                raise ValueError(f"the model has no linear layer {name}")
            layer = self._layers[name]
            by_layer[layer][name] = LoraWeights(A, B, factor)
            outputs, in_features = layer.outputs[name], layer.in_features
            out_features = outputs.stop - outputs.start
            if A.shape != (A.shape[0], in_features) or B.shape != (out_features, A.shape[0]):
                expected = f"A [r, {in_features}] and B [{out_features}, r]"
                raise ValueError(f"{name} takes {expected}, not {tuple(A.shape)} and {tuple(B.shape)}")
        for layer, several in by_layer.items():
            layer.add(slot, widened(several, layer.outputs))
        if own:
            self.overlays.add(slot, own)
        self._dropouts[slot] = _Dropout(dropout, seed)

    def remove(self, slot: int) -> None:
        """Free a slot; nothing of the adapter is kept. Raises KeyError for a slot that is empty."""
        del self._dropouts[slot]
        for layer in set(self._layers.values()):
            layer.remove(slot)
        self.overlays.remove(slot)

    @contextmanager
    def route(self, route: Route) -> Iterator[None]:
        """Send the rows of all forward passes inside through their adapters. Keep it open until backward has ended.

        Raises:
            KeyError: a slot of the route is empty. RuntimeError: another route is open.
        """
        if self._current is not None:
            raise RuntimeError("another route is open")
        if missing := sorted(route.slots - self._dropouts.keys()):
            raise KeyError(f"no adapter in slot {missing[0]}")
        self._current = route
        self.overlays.enter(route)
        try:
            yield
        finally:
            self._current = None
            self.overlays.leave()

    def lay_under(self, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put one frozen adapter under all rows, as if it were part of the base; an empty mapping takes it off.

        weights: by module name, (A [rank, in], B [out, rank]), in the dtype of the computation; their scaling is 1.
        """
        for name, layer in self._layers.items():
            if len(layer.outputs) > 1:
                raise ValueError(f"{name} is computed with its siblings")
            layer.under = weights.get(name)

    def detach(self) -> None:
        """Give the model its own layers back."""
        self.overlays.detach()
        for layer in set(self._layers.values()):
            layer.detach()

    def dropout(self, slot: int) -> _Dropout:
        return self._dropouts[slot]

    @property
    def current(self) -> Route | None:
        """The open route."""
        return self._current


class _Layer:
    """One linear layer of the base, or a wide one of siblings, and the adapters on it."""

    def __init__(self, name: str, module: nn.Module, owner: MultiLora, outputs: Mapping[str, slice]) -> None:
        """outputs: which of its outputs are those of a module, by name."""
        self.name, self.module, self.owner, self.outputs = name, module, owner, outputs
        self.in_features: int = module.in_features  # type: ignore[assignment]  # untyped
        self.weights: dict[int, LoraWeights] = {}
        self.under: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last: tuple[frozenset[int], Together] | None = None
        self._forward, self._former = module.forward, vars(module).get("forward")
        module.forward = self.forward

    def add(self, slot: int, weights: LoraWeights) -> None:
        self.weights[slot] = weights
        self._last = None

    def remove(self, slot: int) -> None:
        self.weights.pop(slot, None)
        self._last = None

    def detach(self) -> None:
        if self._former is None:
            del self.module.forward
        else:
            self.module.forward = self._former

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """What all adapters of this layer add to."""
        y = self._forward(x)
        if self.under is None:
            return y
        A, B = self.under
        return y + functional.linear(functional.linear(x.to(A.dtype), A), B).to(y.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]; the leading dimensions, flattened, are the rows of the open route."""
        route = self.owner.current
        if route is None:
            return self.base(x)
        weights = self._of(route.slots)
        if not weights:
            return self.base(x)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != route.rows:
            raise ValueError(f"{self.name} got {len(rows)} rows, the route has {route.rows}")
        y = self.base(rows)
        scheme = self.owner.scheme if self.owner.scheme != "auto" else cheapest(weights, route, y)
        y = SCHEMES[scheme](self._dropped(rows, weights, route), y, weights, route)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _of(self, slots: frozenset[int]) -> Together:
        """The adapters of these slots. The last answer is kept: one batch after the other mixes the same ones, and one
        whose requests end takes away from them. Then those that are left may do with the old stack for a while."""
        if self._last is not None:
            known, weights = self._last
            if known == slots or (slots < known and 2 * len(slots) > len(known) and not weights.trained):
                return weights
        self._last = slots, Together((slot, w) for slot, w in self.weights.items() if slot in slots)
        return self._last[1]

    def _dropped(self, x: torch.Tensor, weights: Mapping[int, LoraWeights], route: Route) -> torch.Tensor:
        """``x`` [T, in] as the adapters read it: each drops elements of its own rows, as `torch.nn.Dropout` would."""
        if not self.module.training:
            return x
        dropouts = {slot: self.owner.dropout(slot) for slot in weights}
        if not any(dropout.probability for dropout in dropouts.values()):
            return x
        keep = torch.ones_like(x)
        for segment in route.segments:
            dropout = dropouts.get(segment.slot)
            if dropout is None or not dropout.probability:
                continue
            seed = dropout_seed(dropout.seed, route.step_of(segment.slot), self.name)
            generator = torch.Generator(x.device).manual_seed(seed)
            drawn = torch.empty(segment.end - segment.start, x.shape[1], dtype=x.dtype, device=x.device)
            drawn.bernoulli_(1 - dropout.probability, generator=generator).div_(1 - dropout.probability)
            rows = slice(segment.start, segment.end)
            keep[rows if route.order is None else route.order[rows]] = drawn
        return x * keep


def attach(
    model: PreTrainedModel,
    target_modules: str | list[str] = "all-linear",
    *,
    scheme: str = "auto",
    siblings: Sequence[Siblings] = (),
) -> MultiLora:
    """Let adapters share linear layers of ``model`` (4-bit ones too; not its output head), and freeze it.

    target_modules: as in the recipe; the layers that any adapter may have. scheme: how adapters share a matmul: masked,
    segmented, grouped, or auto, which takes what is cheapest for the shape. siblings: layers of the model that are
    computed together; all of a group must be targets. Adapters on them are only applied, not trained.

    Raises:
        UsageError: R320, when a target matches no layer of the model.
    """
    model.requires_grad_(False)
    targets = peft_config.target_modules(target_modules, model)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in peft_config.linear_layers(model).items()
        if isinstance(module, nn.Linear) and peft_config.targeted(name, targets)
    }
    return MultiLora(model, layers, scheme, siblings)
