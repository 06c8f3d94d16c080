"""What passes between a federation's server and its clients: plain data, whatever carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rayft.federate.factors import Products
from rayft.federate.optimizers import Moments
from rayft.federate.state import State


@dataclass(frozen=True)
class Alphas:
    """How an adapter's product is scaled: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""

    alpha: float
    rslora: bool = False
    by_module: Mapping[str, float] = field(default_factory=dict)
    """PEFT's `alpha_pattern`."""

    def scaling(self, module: str, rank: int) -> float:
        alpha = self.alpha
        if self.by_module:
            from peft.utils.other import get_pattern_key

            alpha = self.by_module.get(get_pattern_key(self.by_module, module), alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class Server:
    """All that the server knows between two rounds."""

    state: State
    """The tensors that clients train, in the number format they are sent in."""
    accumulator: Products = field(default_factory=dict)
    """Frozen sum beside the adapter: what former rounds have put aside. Scaling folded in."""
    moments: Moments = field(default_factory=dict)
    control: State = field(default_factory=dict)
    """SCAFFOLD's c, fp64."""
    clip: float | None = None
    """Clipping norm of the next round."""
    rounds: int = 0
    """Rounds done."""

    def plain(self) -> dict[str, Any]:
        """For ``torch.save``."""
        return {
            "state": dict(self.state),
            "accumulator": {module: list(product) for module, product in self.accumulator.items()},
            "moments": self.moments,
            "control": dict(self.control),
            "clip": self.clip,
            "rounds": self.rounds,
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Server:
        accumulator: Products = {module: (pair[0], pair[1]) for module, pair in plain["accumulator"].items()}
        return cls(**{**plain, "accumulator": accumulator})


@dataclass(frozen=True)
class Answer:
    """What a client sends at the end of a round. ``error``: why there is nothing to use; then the rest is empty."""

    client: int
    state: State = field(default_factory=dict)
    """The tensors it trained, as they are now."""
    examples: int = 0
    control: State = field(default_factory=dict)
    """SCAFFOLD: the change of its control variate."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """loss (mean over its steps), steps, tokens, seconds."""
    error: str = ""


@dataclass(frozen=True)
class Partial:
    """What is left of the answers of one block, or of several that were joined: sums in fp64."""

    weight: float = 0.0
    clients: tuple[int, ...] = ()
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sum of weight x change; with hetlora of weight x padded state."""
    products: Products = field(default_factory=dict)
    """Sum of weight x scaling x B A."""
    controls: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sum of the changes of control variates."""
    members: tuple[tuple[int, float, State], ...] = ()
    """(client, weight, state) one by one, for strategies that need them so."""
    unclipped: int = 0
    """Clients whose change was not longer than the clipping norm."""
    facts: dict[str, float] = field(default_factory=dict)
    """Sums over clients: loss_weight, loss x loss_weight, steps, tokens, examples, bytes_up."""
    failed: tuple[tuple[int, str], ...] = ()
    """(client, reason) of those that are left out."""
