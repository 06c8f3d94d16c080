"""What the engine is asked, and what it answers token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayft.errors import RayftError, UsageError

EndReason = Literal["stop", "length", "cancelled", "error"]

TOP_LOGPROBS = 20
"""The most alternatives that a request may ask for per token, as in OpenAI's API."""


class Overloaded(RayftError):
    """Too much is waiting already. The same request may succeed later."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. The defaults are greedy.

    Order, as in transformers: logit bias, repetition penalty, presence and frequency penalty, minimum length, then (not
    when greedy) temperature, top-k, top-p, min-p. Raises UsageError R811 for a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 = the most likely token. Else logits are divided by it and one token is drawn."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this much probability (arXiv 1904.09751)."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 = from all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Hugging Face's: logits of tokens in prompt or answer are divided by it, negative ones multiplied (arXiv
    1909.05858)."""
    presence_penalty: float = 0.0
    """OpenAI's: subtracted once from the logits of tokens that the answer holds; the prompt does not count."""
    frequency_penalty: float = 0.0
    """OpenAI's: subtracted as often as the answer holds the token; the prompt does not count."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """The same request with the same seed gets the same answer, whatever else runs; None = another answer each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Whether the model's own end tokens are tokens like others. Not for answers that follow a grammar."""
    min_tokens: int = 0
    """Before that many tokens nothing ends the answer: end tokens are never chosen, stop texts are not looked for. A
    grammar wins: where nothing else may follow, the answer ends."""
    logprobs: bool = False
    """Whether to report the logarithm of the probability of each token, under the raw logits."""
    top_logprobs: int = 0
    """How many of the most likely tokens to report beside it."""

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float, float]] = {
            "max_new_tokens": (self.max_new_tokens, 1, math.inf),
            "temperature": (self.temperature, 0, 1e6),
            "top_k": (self.top_k, 0, math.inf),
            "min_p": (self.min_p, 0, 1),
            "presence_penalty": (self.presence_penalty, -2, 2),
            "frequency_penalty": (self.frequency_penalty, -2, 2),
            "min_tokens": (self.min_tokens, 0, self.max_new_tokens),
            "top_logprobs": (self.top_logprobs, 0, TOP_LOGPROBS),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UsageError("R811", f"{name} lies between {low:g} and {high:g}; {value} was given")
        for name, value in (("top_p", self.top_p), ("repetition_penalty", self.repetition_penalty)):
            if not 0 < value <= (1 if name == "top_p" else 1e3):
                raise UsageError("R811", f"{name} is above 0{' and at most 1' * (name == 'top_p')}; {value} was given")
        if bad := [value for value in self.logit_bias.values() if not math.isfinite(value)]:
            raise UsageError("R811", f"logit_bias takes finite numbers; {bad[0]} was given")
        if "" in self.stop:
            raise UsageError("R811", "stop: an empty text would end every answer at once")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One prompt to be continued by one adapter or the bare base."""

    id: str
    """Unique among the requests in flight."""
    prompt: Sequence[int]
    """Token ids, at least one; all that the model sees, special tokens included."""
    adapter: str | None = None
    """Name or content hash of a registered adapter; None = the bare base model."""
    strength: float = 1.0
    """Multiplies the adapter's update: 0 = the base's numbers, 1 = the adapter as it was trained."""
    sampling: SamplingParams = SamplingParams()
    tenant: str = ""
    """Whom the request is counted to: capacity is shared out fairly among (tenant, adapter), and tenants never share
    cached prefixes."""
    priority: int = 0
    """Smaller numbers go first, as in vLLM."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UsageError("R811", "a prompt holds at least one token")
        if not math.isfinite(self.strength):
            raise UsageError("R811", f"strength is a finite number; {self.strength} was given")


@dataclass(frozen=True)
class Usage:
    """What a finished request took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    """Every generated token, one that ended the answer included."""
    cached_tokens: int
    """Tokens of the prompt whose keys and values came from the prefix cache."""
    queued: float | None = field(default=None, compare=False)
    """Seconds that it waited before it began to run; None where it never did, or where that is not known."""


@dataclass(frozen=True)
class TokenEvent:
    """One more token of an answer, or its end without one (cancelled, error)."""

    id: str
    """Of the request."""
    token: int | None
    text: str
    """What is certain to belong to the answer and was not sent before; may be empty, and may hold the text of tokens
    that came earlier."""
    logprob: float | None = None
    """Natural logarithm of the token's probability under the raw logits."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, its logarithm) of the most likely ones, best first."""
    finish_reason: EndReason | None = None
    """Set on the last event of a request only, and so are the next two."""
    usage: Usage | None = None
    error: str | None = None
    """What went wrong, where the reason is `error`."""
