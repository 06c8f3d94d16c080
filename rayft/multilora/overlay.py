"""Modules of the base whose output an adapter changes in its own rows, and in no others.

A module is overlaid only while a batch has such an adapter in it: other batches run the base's own code. Within, the
base computes all rows as it always does, and the rows of an adapter are then replaced, so that those of the base and of
its neighbours stay what they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rayft.multilora.own import Own
from rayft.multilora.route import Route


class Overlays:
    """The overlays of one model, laid over its modules and lifted again as batches want it."""

    def __init__(self, model: PreTrainedModel, shared: Mapping[str, tuple[object, slice]]) -> None:
        """shared: layers with adapters side by side, by the name of a module, and which of their outputs are its;
        overlays lie on their ``base``."""
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.width: int = model.config.get_text_config().hidden_size
        self.tied = bool(getattr(model.config, "tie_word_embeddings", False))
        """Whether head and embedding are one matrix."""
        head = model.get_output_embeddings()
        self.head = next((name for name, module in self.modules.items() if module is head), None)
        """The name of the output head, which sees the route's last rows only."""
        self.route: Route | None = None
        """The open route, where it has such adapters."""
        self._shared = shared
        self._overlays: dict[str, _Overlay] = {}
        self._slots: frozenset[int] = frozenset()
        self._laid = False

    def add(self, slot: int, owns: Mapping[str, Sequence[Own]]) -> None:
        """What the adapter in ``slot`` does, by module name; one after the other where it does several things."""
        self._lift()
        for name, several in owns.items():
            if name not in self._overlays:
                if name in self._shared:
                    layer, outputs = self._shared[name]
                    self._overlays[name] = _Overlay(self, layer, "base", outputs=outputs)
                else:
                    self._overlays[name] = _Overlay(self, self.modules[name], "forward", head=name == self.head)
            self._overlays[name].owns[slot] = tuple(several)
        if owns:
            self._slots |= {slot}

    def remove(self, slot: int) -> None:
        if slot not in self._slots:
            return
        self._lift()
        for overlay in self._overlays.values():
            overlay.owns.pop(slot, None)
        self._overlays = {name: overlay for name, overlay in self._overlays.items() if overlay.owns}
        self._slots -= {slot}

    def enter(self, route: Route) -> None:
        """A batch begins."""
        wanted = not self._slots.isdisjoint(route.slots)
        if wanted != self._laid:
            self._lay() if wanted else self._lift()
        self.route = route if wanted else None

    def leave(self) -> None:
        self.route = None

    def detach(self) -> None:
        """Give the model its own modules back."""
        self._lift()
        self._overlays, self._slots = {}, frozenset()

    def _lay(self) -> None:
        for overlay in self._overlays.values():
            overlay.lay()
        self._laid = True

    def _lift(self) -> None:
        if self._laid:
            for overlay in reversed(self._overlays.values()):  # siblings have theirs one over the other
                overlay.lift()
        self._laid = False


class _Overlay:
    """One function of the base, ``host.attribute``, and what adapters make of its output."""

    def __init__(
        self, owner: Overlays, host: object, attribute: str, *, head: bool = False, outputs: slice = slice(None)
    ) -> None:
        """outputs: the part of the last dimension that is changed."""
        self.owner, self.host, self.attribute, self.head, self.outputs = owner, host, attribute, head, outputs
        self.owns: dict[int, tuple[Own, ...]] = {}

    def lay(self) -> None:
        self.base = getattr(self.host, self.attribute)
        self.former = vars(self.host).get(self.attribute)
        setattr(self.host, self.attribute, self.forward)

    def lift(self) -> None:
        if self.former is None:
            delattr(self.host, self.attribute)
        else:
            setattr(self.host, self.attribute, self.former)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the route are the first dimension of ``x``, or its first two, flattened; so of the output."""
        output: torch.Tensor = self.base(x)
        route = self.owner.route
        if route is None:
            return output
        route = route.of_head if self.head else route
        slots = self.owns.keys() & route.slots
        if not slots:
            return output
        inputs, bare = _rows(x, route.rows), _rows(output, route.rows)
        result = bare.clone()
        for slot in slots:
            rows = route.rows_of(slot)
            changed = y = bare[rows][..., self.outputs]
            for own in self.owns[slot]:
                changed = own(inputs[rows], changed)
            if route.strength is not None:
                strength = route.strength[rows].to(y.dtype).view(-1, *[1] * (y.ndim - 1))
                changed = torch.lerp(y, changed.to(y.dtype), strength)
            result[rows, ..., self.outputs] = changed.to(y.dtype)
        return result.view_as(output)


def _rows(x: torch.Tensor, count: int) -> torch.Tensor:
    if x.shape[0] == count:
        return x
    if x.ndim > 1 and x.shape[0] * x.shape[1] == count:
        return x.flatten(0, 1)
    raise ValueError(f"an input {tuple(x.shape)} has not the {count} rows of the route")
