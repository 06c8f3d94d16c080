"""An adapter taken apart: what it shares a matmul for with others, and what it does to each module by itself.

This is for adapters that are only applied. Those that are trained in a pack are plain LoRA, see `AdapterState.weights`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from torch import nn

from rayft.errors import UsageError
from rayft.multilora import lengths
from rayft.multilora.bank import PREFIX, AdapterState, refused, scaling
from rayft.multilora.linear import MultiLora
from rayft.multilora.own import Copy, Gain, HeadRows, Own, Shift, TokenRows, TokenUpdate, Update
from rayft.multilora.schemes import LoraWeights

KINDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
    "base_layer.bias": "bias",
    "token_adapter.trainable_tokens_delta": "tokens",
    "token_adapter.base_layer.weight": "base",
}
"""What PEFT's names end with, and what it is. Other names end with that of a parameter of the module."""
KINDS_OF_MATRICES = {"A", "B", "magnitude", "base", "tokens"}
_SUFFIX = re.compile(rf"(.+)\.({'|'.join(re.escape(ending) for ending in sorted(KINDS, key=len, reverse=True))})")

OTHER_SETTINGS = ("alora_invocation_tokens", "lora_bias", "layer_replication", "arrow_config", "use_qalora")
"""Of PEFT's LoRA configuration; each makes it compute something else."""


@dataclass(frozen=True)
class Parts:
    """An adapter in the number format of its file; DoRA's lengths are computed already, and LoRA's B has the gain."""

    config: LoraConfig
    shared: Mapping[str, LoraWeights]
    """By the name of a shared layer."""
    own: Mapping[str, tuple[Own, ...]]
    """By the name of any module."""


def parts_of(state: AdapterState, mlora: MultiLora) -> Parts:
    """Take an adapter apart for the base model of ``mlora``. Computes; reads of the base only its own weights.

    LoRA and DoRA on linear layers, on the output head and on the embedding; whole modules; biases; trained tokens.

    Raises:
        UsageError: R802 for what cannot share a base, R803 where the adapter does not fit this one.
    """
    config: Any = state.config
    if not isinstance(config, LoraConfig):
        raise refused(f"is of the kind {config.peft_type}")
    if strange := next((name for name in OTHER_SETTINGS if getattr(config, name, None)), None):
        raise refused(f"has the setting {strange}")
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in state.tensors.items():
        name = name.removeprefix(PREFIX)
        match = _SUFFIX.fullmatch(name)
        module, _, part = (match[1], "", KINDS[match[2]]) if match else name.rpartition(".")
        tensors[module][part] = tensor
    taker = _Taker(config, mlora)
    for module, parts in tensors.items():
        taker.take(module, parts)
    taker.tie()
    return Parts(config, taker.shared, taker.own)


class _Taker:
    """Takes modules, one after the other."""

    def __init__(self, config: LoraConfig, mlora: MultiLora) -> None:
        self.config, self.mlora, self.overlays = config, mlora, mlora.overlays
        self.shared: dict[str, LoraWeights] = {}
        self.own: dict[str, tuple[Own, ...]] = {}
        self.rows: HeadRows | None = None
        """The tokens that have other rows in the embedding."""

    def take(self, name: str, parts: dict[str, torch.Tensor]) -> None:
        module = self.overlays.modules.get(name)
        if module is None:
            _misfit(f"which has no module {name}")
        if not isinstance(module, nn.Linear | nn.Embedding) and (strange := parts.keys() & KINDS_OF_MATRICES):
            _misfit(f"where {name} has no {min(strange)}")
        if "base" in parts:
            _same(name, module, parts.pop("base"))
        bias = self._bias(name, module, parts)
        if "tokens" in parts:
            self._tokens(name, module, parts.pop("tokens"))
            if parts:
                raise refused(f"holds {name}.{min(parts)} beside trained tokens")
        elif {"A", "B"} <= parts.keys():
            update = {key: parts.pop(key) for key in ("A", "B")}
            magnitude = parts.pop("magnitude", None)
            if isinstance(module, nn.Linear):
                self._linear(name, module, update["A"], update["B"], magnitude, bias)
            elif isinstance(module, nn.Embedding):
                self._embedding(name, module, update["A"], update["B"], magnitude)
            if parts:
                raise refused(f"holds {name}.{min(parts)} beside LoRA")
        elif parts:
            self._copy(name, module, parts)

    def tie(self) -> None:
        """Where head and embedding are one matrix, both get the rows, unless the file has others for the head."""
        head = self.overlays.head
        if self.rows is None or head is None or not self.overlays.tied:
            return
        if not isinstance(self.own.setdefault(head, (self.rows,))[0], HeadRows):
            raise refused(f"changes {head} beside the tokens that it has from the embedding")

    def _bias(self, name: str, module: nn.Module, parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """That of the adapter if it has one, else the base's."""
        own: torch.Tensor | None = module.bias if isinstance(module, nn.Linear | nn.LayerNorm) else None
        if "bias" not in parts or "weight" in parts:
            return own
        if own is None:
            _misfit(f"where {name} has no bias")
        bias = parts.pop("bias").detach()
        _fits(name, (bias,), (own.shape,))
        self.own[name] = (Shift(bias.cpu().float() - own.detach().cpu().float()),)
        return bias

    def _linear(
        self,
        name: str,
        module: nn.Linear,
        A: torch.Tensor,
        B: torch.Tensor,
        magnitude: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        wanted = (A.shape[0], module.in_features), (module.out_features, A.shape[0])
        _fits(name, (A, B), wanted)
        factor = scaling(self.config, name, A.shape[0])
        own = [*self.own.get(name, ())]
        if magnitude is not None:
            _fits(name, (magnitude,), ((module.out_features,),))
            B, gain = _gained(B, magnitude, lengths.of_rows(module, *_scaled(A, B, factor)))
            own.append(Gain(gain, None if bias is None else bias.detach()))
        if name in self.mlora.modules:
            self.shared[name] = LoraWeights(A, B, factor)
        else:
            own.append(Update(A, B * factor))
        if own:
            self.own[name] = tuple(own)

    def _embedding(
        self, name: str, module: nn.Embedding, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor | None
    ) -> None:
        _fits(name, (A, B), ((A.shape[0], module.num_embeddings), (module.embedding_dim, A.shape[0])))
        factor, gain = scaling(self.config, name, A.shape[0]), None
        if magnitude is not None:
            _fits(name, (magnitude,), ((module.embedding_dim,),))
            B, gain = _gained(B, magnitude, lengths.of_columns(module, *_scaled(A.t(), B, factor)))
        self.own[name] = (TokenUpdate(A.t().contiguous(), B * (factor * _scale(module)), gain),)

    def _tokens(self, name: str, module: nn.Module, rows: torch.Tensor) -> None:
        chosen: Any = self.config.trainable_token_indices
        if isinstance(chosen, dict):
            chosen = next((tokens for end, tokens in chosen.items() if f".{name}".endswith(f".{end}")), None)
        weight: torch.Tensor = module.weight  # type: ignore[assignment]  # untyped
        if chosen is None or len(chosen) != len(rows) or rows.shape[1:] != weight.shape[1:]:
            _misfit(f"where the rows of {name} are not those of its trainable_token_indices")
        tokens = torch.tensor(chosen)
        if strange := [token for token in chosen if not 0 <= token < len(weight)]:
            raise refused(f"trains token {strange[0]}, and the base has a vocabulary of {len(weight)} tokens")
        if not isinstance(module, nn.Embedding):
            self.own[name] = (HeadRows(tokens, rows),)
            return
        place = torch.full((len(weight),), -1)
        place[tokens] = torch.arange(len(tokens))
        self.own[name] = (TokenRows(place, rows * _scale(module)),)
        self.rows = HeadRows(tokens, rows)

    def _copy(self, name: str, module: nn.Module, parts: dict[str, torch.Tensor]) -> None:
        own = dict(module.named_parameters(recurse=False))
        if strange := parts.keys() - own.keys():
            _misfit(f"where {name} has no {min(strange)}")
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise refused(f"holds a copy of {name}, which the base has in 4 or 8 bits")
        if "weight" not in parts:
            raise refused(f"holds {name}.{min(parts)} without its weight")
        for part, tensor in parts.items():
            if isinstance(module, nn.Embedding) or name == self.overlays.head:
                _vocabulary(name, tensor, own[part])
            _fits(name, (tensor,), (own[part].shape,))
        if not isinstance(module, nn.Linear | nn.Embedding) and own["weight"].shape != (self.overlays.width,):
            raise refused(f"holds a copy of {name}, whose rows are not those of the batch")
        self.own[name] = (Copy(module, parts),)


def _scaled(A: torch.Tensor, B: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in fp32, B with scaling."""
    return A.detach().float(), B.detach().float() * factor


def _gained(B: torch.Tensor, magnitude: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B with DoRA's gain in its rows, and the gain less 1; in host memory."""
    gain = magnitude.detach().cpu().float() / length.cpu()
    return B.detach().cpu().float() * gain[:, None], gain - 1


def _scale(embedding: nn.Module) -> float:
    """What the embeddings of Gemma are multiplied with."""
    return float(getattr(embedding, "embed_scale", 1.0))


def _same(name: str, module: nn.Module, weight: torch.Tensor) -> None:
    """PEFT also saves the base's own embedding and head where an adapter is on them."""
    own = lengths.dense(module)
    _vocabulary(name, weight, own)
    _fits(name, (weight,), (own.shape,))
    if not torch.allclose(weight.to(own.device, torch.float32), own.float(), rtol=1e-2, atol=1e-5):  # bf16 is as coarse
        raise refused(f"brings other base weights for {name}")


def _vocabulary(name: str, tensor: torch.Tensor, own: torch.Tensor) -> None:
    if tensor.shape[1:] == own.shape[1:] and len(tensor) != len(own):
        raise refused(f"has a vocabulary of {len(tensor)} tokens in {name}, and the base one of {len(own)}")


def _fits(name: str, tensors: tuple[torch.Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    given = [tuple(tensor.shape) for tensor in tensors]
    if given != (wanted := [tuple(shape) for shape in shapes]):
        sizes = " and ".join(map(str, wanted))
        _misfit(f"where {name} takes {sizes}, not {' and '.join(map(str, given))}")


def _misfit(reason: str) -> NoReturn:
    raise UsageError("R803", f"this adapter does not fit the base model, {reason}")
