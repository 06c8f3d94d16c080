"""What generates text: the protocol, and the plain data that goes in and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue."""

    ids: Sequence[int]
    """At least one; all that the model sees, special tokens included."""
    adapter: str | None = None
    """Name of the adapter that answers; None = the bare base model."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy: the most likely one, always the same."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 = greedy. Else logits are divided by it before one token is drawn."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this much probability (arXiv 1904.09751). Greedy ignores it."""
    seed: int = 0
    """The same prompts in the same order, with the same seed, give the same answers."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's own end tokens."""
    logprobs: bool = False
    """Whether to return log-probabilities; they cost the memory of all logits of a batch."""


@dataclass(frozen=True)
class Completion:
    """One answer."""

    ids: tuple[int, ...]
    """Every generated token, the one that ended the answer included."""
    text: str
    """The answer without special tokens and without the stop text."""
    finish_reason: FinishReason
    """stop: an end token or stop text; length: cut at `max_new_tokens`."""
    logprobs: tuple[float, ...] | None = None
    """Natural logarithm of the probability of each id under the raw logits, whatever the temperature."""


class Generator(Protocol):
    """Anything that answers prompts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        ...
