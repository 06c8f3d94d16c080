"""What an adapter does of its own to its rows of one module, beyond the LoRA matrices that many share a matmul for.

Each kind is called with ``x``, the module's input at these rows, and ``y``, what the module gave for them so far, and
returns what it gives with the adapter. None of them writes into ``y``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from rayft.models.prepack import prepack


@dataclass(frozen=True)
class Own:
    """The tensors of one kind, wherever they lie."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same there; ``dtype`` is for what is no index."""
        moved = {field.name: _moved(getattr(self, field.name), device, dtype) for field in fields(self)}
        return replace(self, **moved)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Shift(Own):
    """Another bias."""

    difference: torch.Tensor
    """[out]"""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.difference


@dataclass(frozen=True)
class Gain(Own):
    """DoRA's new length of each row of a linear layer's weight, without what LoRA adds: the shared matmul does that,
    with the gain in its B. Equation 5 of arXiv 2402.09353; PEFT leaves the bias as it is."""

    gain: torch.Tensor
    """[out]: magnitude / length - 1."""
    bias: torch.Tensor | None
    """[out], that of the adapter if it has one."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(y, y if self.bias is None else y - self.bias, self.gain)


@dataclass(frozen=True)
class Update(Own):
    """LoRA on a linear layer that is not shared, such as the output head."""

    A: torch.Tensor
    """[rank, in]"""
    B: torch.Tensor
    """[out, rank], with scaling."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + functional.linear(functional.linear(x, self.A), self.B)


@dataclass(frozen=True)
class TokenUpdate(Own):
    """LoRA on an embedding, with DoRA's gain if there is one."""

    A: torch.Tensor
    """[vocabulary, rank]: PEFT's ``lora_embedding_A``, transposed."""
    B: torch.Tensor
    """[width, rank], with scaling, gain and the embedding's own scale."""
    gain: torch.Tensor | None
    """[width]: magnitude / length - 1."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y if self.gain is None else torch.addcmul(y, y, self.gain)
        return y + functional.linear(functional.embedding(x, self.A), self.B)


@dataclass(frozen=True)
class TokenRows(Own):
    """Some tokens that have another row in the embedding (PEFT's ``trainable_token_indices``)."""

    place: torch.Tensor
    """int64[vocabulary]: where a token's row is in ``rows``, -1 for the others."""
    rows: torch.Tensor
    """[n, width], with the embedding's own scale."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        place = self.place[x]
        return torch.where((place >= 0)[..., None], self.rows[place.clamp(min=0)], y)


@dataclass(frozen=True)
class HeadRows(Own):
    """The same tokens in an output head whose matrix is the embedding's."""

    tokens: torch.Tensor
    """int64[n]"""
    rows: torch.Tensor
    """[n, width]"""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.index_copy(-1, self.tokens, functional.linear(x, self.rows))


@dataclass(frozen=True)
class Copy(Own):
    """A module without children that the adapter has whole (PEFT's ``modules_to_save``)."""

    module: nn.Module
    """The base's, which gives whatever is not a parameter."""
    tensors: Mapping[str, torch.Tensor]
    """By the parameter's name."""

    @cached_property
    def twin(self) -> nn.Module:
        twin = copy.copy(self.module)
        twin.__dict__.pop("forward", None)  # what others have put on the base's module
        frozen = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self.tensors.items()}
        twin._parameters = {**self.module._parameters, **frozen}
        prepack(twin)
        return twin

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = self.twin(x)
        return own


def _moved(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(part, device, dtype) for name, part in value.items()}
    return value
