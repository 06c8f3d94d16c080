"""EngineGenerator = HFGenerator, greedy, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayft.errors import UsageError
from rayft.inference import Completion, Prompt, Sampling
from rayft.inference.engine_generator import EngineGenerator
from rayft.inference.hf import HFGenerator
from tests.inference.oracle import Reference, random_prompt


def prompts(tokenizer: Any, count: int, adapters: tuple[str | None, ...]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(9)
    return [Prompt(random_prompt(generator, len(tokenizer), 40), adapters[i % len(adapters)]) for i in range(count)]


def same(ours: list[Completion], theirs: list[Completion]) -> bool:
    """All fields; log-probabilities to 2e-4."""
    return all(
        (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)
        and a.logprobs == (None if b.logprobs is None else pytest.approx(b.logprobs, abs=2e-4))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=10),
        Sampling(max_new_tokens=10, logprobs=True),
        Sampling(max_new_tokens=14, stop=("er", "P", "th", "o")),
    ],
    ids=["plain", "logprobs", "stop"],
)
def test_both_generators_answer_the_same(engine_with: Any, peft: Reference, tokenizer: Any, sampling: Sampling) -> None:
    asked = prompts(tokenizer, 18, (None, "carl", "hugo"))
    theirs = HFGenerator(peft.model, tokenizer).generate(asked, sampling)
    ours = EngineGenerator(engine_with(max_num_seqs=7)).generate(asked, sampling)
    assert same(ours, theirs)
    assert len({answer.ids for answer in ours}) == len(asked)
    if sampling.stop:
        assert {answer.finish_reason for answer in ours} == {"stop", "length"}


def test_an_end_token_ends_an_answer(engine_with: Any, peft: Reference, base: Any, tokenizer: Any) -> None:
    asked = prompts(tokenizer, 6, ("emil",))
    free = EngineGenerator(engine_with()).generate(asked, Sampling(max_new_tokens=8))
    causal = peft.model.get_base_model()
    before = causal.generation_config.eos_token_id, base.generation_config.eos_token_id
    for model in (causal, base):
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, free[0].ids[3]]
    theirs = HFGenerator(peft.model, tokenizer).generate(asked, Sampling(max_new_tokens=8))
    ours = EngineGenerator(engine_with()).generate(asked, Sampling(max_new_tokens=8))
    causal.generation_config.eos_token_id, base.generation_config.eos_token_id = before
    assert same(ours, theirs)
    assert ours[0].finish_reason == "stop" and len(ours[0].ids) <= 4


def test_draws_follow_the_seed_and_not_the_other_prompts(engine_with: Any, tokenizer: Any) -> None:
    generator = EngineGenerator(engine_with(max_num_seqs=4, max_queued_tokens=50))
    asked = prompts(tokenizer, 8, (None, "anna"))
    drawn = Sampling(max_new_tokens=8, temperature=5.0, seed=1)
    answers = generator.generate(asked, drawn)
    assert generator.generate(asked[:3], drawn) == answers[:3]
    assert generator.generate(asked, Sampling(max_new_tokens=8, temperature=5.0, seed=2)) != answers
    greedy = generator.generate(asked, Sampling(max_new_tokens=8))
    assert generator.generate(asked, Sampling(max_new_tokens=8, temperature=5.0, top_p=1e-6)) == greedy


def test_nothing_is_computed_when_a_prompt_is_wrong(engine_with: Any, tokenizer: Any) -> None:
    engine = engine_with()
    generator = EngineGenerator(engine)
    with pytest.raises(UsageError, match="R815") as error:
        generator.generate([*prompts(tokenizer, 3, (None,)), Prompt((5,), "nobody")], Sampling())
    assert "nobody" in error.value.message and not engine.busy
    assert generator.generate([], Sampling()) == []
