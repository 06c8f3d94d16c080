"""The adapters of one base model: they come from PEFT's files or from a recipe, and leave as PEFT's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load
from torch import nn

from rayft.errors import UsageError
from rayft.models.save import ADAPTER_WEIGHTS
from rayft.multilora.linear import MultiLora
from rayft.multilora.schemes import LoraWeights
from rayft.runs.content import lora_hash

if TYPE_CHECKING:
    from rayft.multilora.parts import Parts

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in an adapter file."""


@dataclass(frozen=True)
class AdapterState:
    """An adapter as PEFT saves it: its config, and its tensors by PEFT's names."""

    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> AdapterState:
        """From a stock adapter folder. Raises UsageError R801 for one that is damaged or is no LoRA adapter."""
        try:
            config = PeftConfig.from_pretrained(str(folder))
            # Not `load_file`, which in safetensors 0.8 leaks two objects per tensor: a server loads for months.
            tensors = load(Path(folder, ADAPTER_WEIGHTS).read_bytes())
        except Exception as error:  # PEFT and safetensors raise whatever they meet in a damaged file
            raise UsageError("R801", f"{folder} cannot be read as a PEFT adapter: {error}") from error
        return cls(config, tensors)

    def content_hash(self) -> str:
        """sha256 of tensors and config, the identity of an adapter: two with the same hash give the same answers."""
        return lora_hash(
            vars(self.config),
            (
                (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _bytes(tensor))
                for name, tensor in self.tensors.items()
            ),
        )

    def weights(self) -> dict[str, LoraWeights]:
        """By module name. Raises UsageError R802 for more than plain LoRA (see `unsupported`)."""
        if reason := unsupported(self.config, self.tensors):
            raise refused(reason)
        names = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in self.tensors}
        return {
            name: LoraWeights(
                self.tensors[f"{PREFIX}{name}.lora_A.weight"],
                self.tensors[f"{PREFIX}{name}.lora_B.weight"],
                scaling(self.config, name, self.tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0]),
            )
            for name in sorted(names)
        }


def scaling(config: LoraConfig, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732); alpha may differ by module."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def unsupported(config: PeftConfig, names: Iterable[str]) -> str | None:
    """What makes an adapter more than two matrices per linear layer, as the end of a sentence; None for plain LoRA."""
    if not isinstance(config, LoraConfig):
        return f"is of the kind {config.peft_type}"
    if config.use_dora:
        return "uses DoRA"
    if strange := sorted(name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))):
        return f"holds {strange[0]}"
    return None


def refused(reason: str) -> UsageError:
    """R802, for an adapter that ``reason``."""
    return UsageError("R802", f"this adapter {reason}, which cannot share a base model with others")


class Bank:
    """Slots of a `MultiLora`, filled from adapter states. Adapters come and go between forward passes."""

    def __init__(self, mlora: MultiLora) -> None:
        self.mlora = mlora
        self._held: dict[int, _Held] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    def load(
        self, source: AdapterState | str | Path, *, trainable: bool = False, dropout: float | None = None, seed: int = 0
    ) -> int:
        """Put an adapter into a free slot and return its number.

        source: a state, or a stock adapter folder. trainable: its tensors become fp32 parameters, and ``dropout`` (that
        of its config by default) is applied in training mode with masks drawn from ``seed``; otherwise they are
        used in the dtype they have.

        Raises:
            UsageError: R801, R802, or R803 where the adapter does not fit this base.
        """
        state = source if isinstance(source, AdapterState) else AdapterState.read(source)
        weights = {
            name: LoraWeights(self._place(name, A, trainable), self._place(name, B, trainable), factor)
            for name, (A, B, factor) in state.weights().items()
        }
        slot = self._free()
        rate = state.config.lora_dropout if dropout is None else dropout
        try:
            self.mlora.add(slot, weights, dropout=rate if trainable else 0.0, seed=seed)
        except ValueError as error:
            raise UsageError("R803", f"this adapter does not fit the base model: {error}") from error
        self._held[slot] = _Held(state.config, weights)
        return slot

    def put(self, parts: Parts, dtype: torch.dtype) -> int:
        """Put an adapter of any kind into a free slot, to be applied only, in ``dtype``; returns the slot."""
        shared = {
            name: LoraWeights(self._place(name, A.to(dtype), False), self._place(name, B.to(dtype), False), factor)
            for name, (A, B, factor) in parts.shared.items()
        }
        own = {
            name: [one.to(self.mlora.device_of(name), dtype) for one in several] for name, several in parts.own.items()
        }
        slot = self._free()
        self.mlora.add(slot, shared, own=own)
        self._held[slot] = _Held(parts.config, {})  # not a second copy where siblings are joined
        return slot

    def unload(self, slot: int) -> None:
        """Free the slot and everything the adapter held. Raises KeyError for an empty one."""
        self.mlora.remove(slot)
        del self._held[slot]

    def state(self, slot: int) -> dict[str, torch.Tensor]:
        """PEFT's state dict of a loaded adapter: copies in host memory, safe from further training steps. Empty for
        one that was `put`, whose `Parts` say what it is."""
        named = self.named_parameters(slot)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}

    def named_parameters(self, slot: int) -> dict[str, torch.Tensor]:
        """The tensors themselves by PEFT's names, A and B of each module."""
        return {
            f"{PREFIX}{module}.lora_{letter}.weight": tensor
            for module, w in self._held[slot].weights.items()
            for letter, tensor in (("A", w.A), ("B", w.B))
        }

    def adapter(self, slot: int) -> AdapterState:
        """Config and copied tensors: what `load` takes and PEFT's files hold."""
        return AdapterState(self._held[slot].config, self.state(slot))

    def _free(self) -> int:
        return next(number for number in range(len(self._held) + 1) if number not in self._held)

    def _place(self, module: str, tensor: torch.Tensor, trainable: bool) -> torch.Tensor:
        if module not in self.mlora.modules:
            raise UsageError("R803", f"this adapter does not fit the base model, which has no linear layer {module}")
        placed = tensor.detach().to(self.mlora.device_of(module))
        return nn.Parameter(placed.float().clone()) if trainable else placed


@dataclass(frozen=True)
class _Held:
    config: LoraConfig
    weights: dict[str, LoraWeights]


def _bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """What a file holds of a tensor; it comes to the host when it is asked for."""
    if tensor.numel():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
