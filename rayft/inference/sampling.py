"""From logits to tokens: one call for all rows of a step, each row with its own parameters and its own generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rayft.inference.request import SamplingParams


class TokenMask(Protocol):
    """What an answer may continue with: a grammar, a schema. One object per request; its calls follow the answer."""

    @property
    def end_ids(self) -> Collection[int]:
        """Tokens with which the mask lets the answer end. They end it, whatever the request says of end tokens."""
        ...

    @property
    def error(self) -> str | None:
        """Why the last call gave no mask, which ends the request."""
        ...

    def allowed(self, generated: Sequence[int]) -> torch.Tensor | None:
        """bool[vocabulary], true for the tokens that may follow; None = all."""
        ...


@dataclass(frozen=True)
class Choice:
    """The next token of one row."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """How one request chooses: its parameters, what it has chosen so far, its random numbers."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        end_ids: Iterable[int],
        mask: TokenMask | None = None,
    ) -> None:
        """end_ids: what `min_tokens` forbids."""
        self.params, self.mask = params, mask
        self.end_ids = sorted(end_ids)
        self.prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self.generated: list[int] = []
        self.counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def chosen(self, token: int) -> None:
        self.generated.append(token)
        self.counts[token] += 1

    def uniform(self) -> float:
        """The next number in [0, 1): one per token, so that a request's draws do not depend on its neighbours."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    @property
    def adjusts(self) -> bool:
        """Whether its next token depends on more than logits and random numbers."""
        p = self.params
        penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        return penalised or bool(p.logit_bias) or self.ends_forbidden or self.mask is not None

    @property
    def ends_forbidden(self) -> bool:
        return len(self.generated) < self.params.min_tokens


def choose(logits: torch.Tensor, rows: Sequence[Chooser]) -> list[Choice]:
    """logits: [n, vocabulary], one line per row. The rows are not told of their token: see `Chooser.chosen`."""
    raw = logits.float()
    scores = adjusted(raw, rows)
    tokens = scores.argmax(-1)
    if drawing := [i for i, row in enumerate(rows) if not row.params.greedy]:
        drawn = [rows[i] for i in drawing]
        tokens[drawing] = draw(warped(scores[drawing], [row.params for row in drawn]), [r.uniform() for r in drawn])
    choices = [Choice(token) for token in tokens.tolist()]
    if reporting := [i for i, row in enumerate(rows) if row.params.logprobs]:
        logprobs = raw[reporting].log_softmax(-1)
        own = logprobs.gather(1, tokens[reporting][:, None])[:, 0].tolist()
        best = logprobs.topk(min(max(rows[i].params.top_logprobs for i in reporting), logprobs.shape[1]))
        for line, i in enumerate(reporting):
            count = rows[i].params.top_logprobs
            top = zip(best.indices[line, :count].tolist(), best.values[line, :count].tolist(), strict=True)
            choices[i] = Choice(choices[i].token, own[line], tuple(top))
    return choices


def adjusted(logits: torch.Tensor, rows: Sequence[Chooser]) -> torch.Tensor:
    """float32[n, vocabulary] with bias, penalties, minimum length and masks applied; ``logits`` stay as they are."""
    if not any(row.adjusts for row in rows):
        return logits
    scores = logits.clone()
    _bias(scores, rows)
    _repetition(scores, rows)
    _presence_and_frequency(scores, rows)
    for i, row in enumerate(rows):
        allowed = row.mask.allowed(row.generated) if row.mask is not None else None
        if row.ends_forbidden and not (allowed is not None and _only(row.end_ids, allowed)):
            scores[i, row.end_ids] = -torch.inf
        if allowed is not None:
            scores[i].masked_fill_(~allowed.to(scores.device), -torch.inf)
    return scores


def _only(ids: Sequence[int], allowed: torch.Tensor) -> bool:
    """Whether a mask allows nothing but these tokens."""
    return int(allowed.sum()) == int(allowed[list(ids)].sum())


def _bias(scores: torch.Tensor, rows: Sequence[Chooser]) -> None:
    entries = [(i, token, value) for i, row in enumerate(rows) for token, value in row.params.logit_bias.items()]
    if entries:
        row, token, value = _columns(entries, scores.device)
        scores.index_put_((row, token), value, accumulate=True)


def _repetition(scores: torch.Tensor, rows: Sequence[Chooser]) -> None:
    entries = [
        (i, token, row.params.repetition_penalty)
        for i, row in enumerate(rows)
        if row.params.repetition_penalty != 1.0
        for token in row.prompt | row.counts.keys()
    ]
    if entries:
        row, token, penalty = _columns(entries, scores.device)
        score = scores[row, token]
        scores[row, token] = torch.where(score < 0, score * penalty, score / penalty)


def _presence_and_frequency(scores: torch.Tensor, rows: Sequence[Chooser]) -> None:
    entries = [
        (i, token, -row.params.presence_penalty - row.params.frequency_penalty * count)
        for i, row in enumerate(rows)
        if row.params.presence_penalty or row.params.frequency_penalty
        for token, count in row.counts.items()
    ]
    if entries:
        row, token, value = _columns(entries, scores.device)
        scores.index_put_((row, token), value, accumulate=True)


def _columns(
    entries: list[tuple[int, int, float]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    row, token, value = zip(*entries, strict=True)
    return (
        torch.tensor(row, device=device),
        torch.tensor(token, device=device),
        torch.tensor(value, dtype=torch.float32, device=device),
    )


def warped(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p, each on what the one before it left; dropped tokens are -inf."""
    scores = scores / _column([p.temperature for p in params], scores)
    if sorting := [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]:
        scores[sorting] = _top(scores[sorting], [params[i] for i in sorting])
    if any(p.min_p for p in params):
        probabilities = scores.softmax(-1)
        least = _column([p.min_p for p in params], scores) * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores


def _top(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    vocabulary = scores.shape[1]
    ascending, order = scores.sort(-1)
    worst = torch.tensor([[vocabulary - min(p.top_k or vocabulary, vocabulary)] for p in params], device=scores.device)
    ascending = ascending.masked_fill(ascending < ascending.gather(1, worst), -torch.inf)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - _column([p.top_p for p in params], scores)
    dropped[:, -1] = False
    return torch.empty_like(scores).scatter_(1, order, ascending.masked_fill(dropped, -torch.inf))


def draw(scores: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """int64[n]: where each row's cumulative distribution, in the order of the token ids, passes its uniform number.

    One number decides, whatever the size of the vocabulary; in that order a rounding error in one logit cannot swap
    distant tokens, as it could among sorted ones.
    """
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    threshold = torch.tensor(uniform, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=scores.shape[1] - 1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
