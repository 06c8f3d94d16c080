"""Penalties, filters and draws against transformers' logits processors, many rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rayft.inference.request import Request, SamplingParams
from rayft.inference.sampling import Chooser, adjusted, choose, draw, warped
from tests.inference.oracle import Reference, random_prompt
from tests.inference.test_engine import ask, finish

VOCABULARY = 100


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


def chooser(params: SamplingParams, prompt: list[int], generated: list[int], mask: Any = None) -> Chooser:
    row = Chooser(params, prompt, (7, 8), mask)
    for token in generated:
        row.chosen(token)
    return row


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_bias_and_repetition_and_minimum_length_are_those_of_transformers() -> None:
    params = [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(logit_bias={3: 5.0, 99: -100.0}),
        SamplingParams(repetition_penalty=0.6, logit_bias={11: 2.5, 12: -3.0}, min_tokens=30),
        SamplingParams(min_tokens=5),
        SamplingParams(min_tokens=20),
    ]
    prompts = [random_ids(30, seed) for seed in range(len(params))]
    answers = [random_ids(12, 50 + seed) for seed in range(len(params))]
    scores = logits(len(params))
    ours = adjusted(scores, [chooser(*parts) for parts in zip(params, prompts, answers, strict=True)])
    for i, (p, prompt, answer) in enumerate(zip(params, prompts, answers, strict=True)):
        processors = LogitsProcessorList()
        if p.logit_bias:
            processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in p.logit_bias.items()]))
        if p.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
        if p.min_tokens:
            processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), p.min_tokens, [7, 8]))
        theirs = processors(torch.tensor([prompt + answer]), scores[i : i + 1].clone())[0]
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-6)
        assert torch.equal(ours[i], scores[i]) == (i in (0, 4))


def test_presence_and_frequency_follow_openais_formula() -> None:
    scores = logits(2)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
    ours = adjusted(scores, [chooser(params, [1, 2, 3], [4, 4, 5, 4]), chooser(SamplingParams(), [1], [4])])
    expected = scores.clone()
    expected[0, 4] += -0.5 + 0.25 * 3
    expected[0, 5] += -0.5 + 0.25 * 1
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("seed", range(3))
def test_filters_are_those_of_transformers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for _ in range(24):
        u = torch.rand(4, generator=generator).tolist()
        params.append(
            SamplingParams(
                temperature=0.1 + 3 * u[0],
                top_k=int(u[1] * 150) if u[1] < 0.7 else 0,
                top_p=u[2] * 1.2 if u[2] * 1.2 < 1 else 1.0,
                min_p=u[3] / 3 if u[3] > 0.5 else 0.0,
            )
        )
    scores = logits(len(params), seed)
    ours = warped(scores, params)
    kept = set()
    for i, p in enumerate(params):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)])
        if p.top_k:
            warpers.append(TopKLogitsWarper(p.top_k))
        if p.top_p < 1:
            warpers.append(TopPLogitsWarper(p.top_p))
        if p.min_p:
            warpers.append(MinPLogitsWarper(p.min_p))
        theirs = warpers(torch.zeros(1, 1, dtype=torch.int64), scores[i : i + 1].clone())[0]
        torch.testing.assert_close(ours[i], theirs)
        kept.add(int(theirs.isfinite().sum()))
    assert len(kept) > 5


def test_draws_have_the_distribution_of_the_scores() -> None:
    scores = torch.tensor([2.0, -torch.inf, 1.0, 0.0, -1.0, -torch.inf])
    count = 20000
    row = Chooser(SamplingParams(temperature=1.0, seed=3), [1], ())
    tokens = draw(scores.expand(count, -1), [row.uniform() for _ in range(count)])
    observed = torch.bincount(tokens, minlength=6).double()
    expected = scores.double().softmax(0) * count
    assert observed[[1, 5]].sum() == 0
    possible = [0, 2, 3, 4]
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001
    assert draw(scores[None], [0.0]).item() == 0
    assert draw(scores[None], [1 - 2**-53]).item() == 4


def test_a_seed_gives_the_same_tokens_in_any_company(engine_with: Any, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_new_tokens=15, temperature=3.0, top_p=0.95, seed=5)
    request = Request("1", random_prompt(generator, len(tokenizer), 40), "bert", sampling=sampling)
    engine = engine_with(max_num_seqs=8, max_num_batched_tokens=16, enable_prefix_caching=False)
    alone = ask(engine, request)
    finish(engine)
    others = [
        Request(f"other {i}", random_prompt(generator, len(tokenizer), 60), (None, "bert", "gina")[i % 3], sampling=s)
        for i, s in enumerate([sampling, SamplingParams(20, temperature=1.0), SamplingParams(20)] * 3)
    ]
    for other in others[:5]:
        ask(engine, other)
    engine.step()
    together = ask(engine, request)
    for other in others[5:]:
        ask(engine, other)
    finish(engine)
    assert together.ids == alone.ids
    other_seed = SamplingParams(max_new_tokens=15, temperature=3.0, top_p=0.95, seed=6)
    different = ask(engine, Request("1", request.prompt, "bert", sampling=other_seed))
    unseeded = [
        ask(engine, Request(f"none {i}", request.prompt, sampling=SamplingParams(max_new_tokens=15, temperature=3.0)))
        for i in range(2)
    ]
    finish(engine)
    assert different.ids != alone.ids
    assert unseeded[0].ids != unseeded[1].ids


def test_logprobs_are_those_of_a_peft_forward(engine_with: Any, peft: Reference, tokenizer: Any) -> None:
    engine = engine_with(max_num_batched_tokens=64)
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(
            str(i),
            random_prompt(generator, len(tokenizer), 30),
            adapter,
            sampling=SamplingParams(
                max_new_tokens=6, temperature=i % 2 * 2.0, seed=1, logprobs=i != 2, top_logprobs=i, logit_bias={9: 3.0}
            ),
        )
        for i, adapter in enumerate([None, "anna", "fred", "hugo"])
    ]
    answers = [ask(engine, request) for request in requests]
    finish(engine)
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        expected = peft.logits(request.prompt, answer.ids, request.adapter).log_softmax(-1)
        for event, row in zip(answer.events, expected, strict=True):
            if i == 2:
                assert event.logprob is None and event.top_logprobs == ()
                continue
            assert event.logprob == pytest.approx(row[event.token].item(), abs=2e-4)
            best = row.topk(i)
            assert [token for token, _ in event.top_logprobs] == best.indices.tolist()
            assert [value for _, value in event.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-4)


class OnlyEven:
    """A grammar: even tokens, and anything after a 4."""

    end_ids: tuple[int, ...] = ()
    error: str | None = None

    def allowed(self, generated: Any) -> torch.Tensor | None:
        if generated and generated[-1] == 4:
            return None
        return torch.arange(VOCABULARY) % 2 == 0


def test_a_mask_restricts_its_own_row() -> None:
    scores = logits(3)
    scores[:, 51] = 50.0
    masked, free = SamplingParams(), SamplingParams(temperature=1.0, seed=1)
    rows = [chooser(masked, [1], [], OnlyEven()), chooser(free, [1], []), chooser(masked, [1], [4], OnlyEven())]
    choices = choose(scores, rows)
    assert choices[0].token % 2 == 0
    assert choices[1].token == choices[2].token == 51
