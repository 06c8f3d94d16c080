"""Prompts that begin alike are computed once, and nobody notices; adapters and tenants share nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayft.inference.engine import Engine
from rayft.inference.request import Request, SamplingParams
from tests.inference.oracle import Reference, judged, random_prompt
from tests.inference.test_engine import Answer, ask, finish, is_empty

SAMPLING = SamplingParams(max_new_tokens=6)


def cached(answer: Answer) -> int:
    assert answer.last.usage is not None
    return answer.last.usage.cached_tokens


def one(engine: Engine, prompt: Any, adapter: str | None = None, **arguments: Any) -> Answer:
    answer = ask(engine, Request("one", tuple(prompt), adapter, sampling=SAMPLING, **arguments))
    finish(engine)
    return answer


@pytest.fixture
def prompt(tokenizer: Any) -> tuple[int, ...]:
    return tuple(torch.randint(3, len(tokenizer), (70,), generator=torch.Generator().manual_seed(0)).tolist())


def test_whole_blocks_of_a_common_beginning_are_not_computed_again(engine_with: Any, prompt: tuple[int, ...]) -> None:
    engine = engine_with(block_size=16)
    first = one(engine, prompt, "carl")
    assert cached(first) == 0
    again = one(engine, prompt, "carl")
    assert cached(again) == 64 and again.ids == first.ids
    assert cached(one(engine, prompt[:40], "carl")) == 32
    assert cached(one(engine, prompt[:64], "carl")) == 48  # at least the last token is computed: it chooses the next
    assert cached(one(engine, [*prompt[:20], 5, *prompt[21:]], "carl")) == 16
    assert cached(one(engine, [5, *prompt[1:]], "carl")) == 0
    continued = one(engine, [*prompt, *first.ids, *prompt[:8]], "carl")
    assert cached(continued) == 64  # 70 + 6 tokens were computed but the last, in blocks of 16
    assert is_empty(engine)


def test_an_answer_is_remembered_like_a_prompt(engine_with: Any, prompt: tuple[int, ...]) -> None:
    engine = engine_with(block_size=16)
    first = one(engine, prompt[:59])
    assert cached(one(engine, [*prompt[:59], *first.ids, 9])) == 64


def test_adapters_strengths_and_tenants_share_nothing(
    engine_with: Any, peft: Reference, prompt: tuple[int, ...]
) -> None:
    engine = engine_with()
    variants: list[dict[str, Any]] = [
        {"adapter": None},
        {"adapter": "carl"},
        {"adapter": "dora"},
        {"adapter": "dora", "strength": 0.5},
        {"adapter": "dora", "tenant": "other"},
    ]
    answers = [one(engine, prompt, **variant) for variant in variants]
    assert [cached(answer) for answer in answers] == [0] * len(variants)
    assert [cached(one(engine, prompt, **variant)) for variant in variants] == [64] * len(variants)
    for answer, name in zip(answers[:3], (None, "carl", "dora"), strict=True):
        assert judged(answer.ids, peft.logits(prompt, answer.ids, name)).same


def test_another_content_under_the_same_name_finds_nothing(
    engine_with: Any, peft: Reference, prompt: tuple[int, ...]
) -> None:
    engine = engine_with()
    engine.register(peft.states["carl"], "live")
    one(engine, prompt, "live")
    assert cached(one(engine, prompt, "carl")) == 64  # the same content under another name does
    engine.register(peft.states["dora"], "live")
    answer = one(engine, prompt, "live")
    assert cached(answer) == 0
    assert judged(answer.ids, peft.logits(prompt, answer.ids, "dora")).same


@pytest.mark.parametrize("budget", [416, 2048], ids=["preempted", "roomy"])
def test_on_equals_off(engine_with: Any, peft: Reference, tokenizer: Any, budget: int) -> None:
    generator = torch.Generator().manual_seed(3)
    beginnings = [random_prompt(generator, len(tokenizer), 60) for _ in range(3)]
    requests = []
    for i in range(20):
        beginning = beginnings[int(torch.randint(3, (), generator=generator))]
        prompt = (*beginning, *random_prompt(generator, len(tokenizer), 12))
        adapter = (None, "bert", "gina")[int(torch.randint(3, (), generator=generator))]
        requests.append(Request(str(i), prompt, adapter, sampling=SamplingParams(max_new_tokens=24)))
    ids = {}
    for on in (False, True):
        engine = engine_with(
            enable_prefix_caching=on,
            kv_cache_tokens=budget,
            max_num_seqs=6,
            max_num_batched_tokens=48,
            block_size=8,
        )
        answers = [ask(engine, request) for request in requests]
        finish(engine)
        assert is_empty(engine)
        assert (engine.scheduler.preemptions > 0) == (budget == 416)
        assert any(cached(answer) for answer in answers) == on
        ids[on] = [answer.ids for answer in answers]
    for request, off, on in zip(requests, ids[False], ids[True], strict=True):
        if off != on:
            assert judged(off, peft.logits(request.prompt, off, request.adapter)).undecided
            assert judged(on, peft.logits(request.prompt, on, request.adapter)).same
    assert ids[False][0] == peft.answer(requests[0].prompt, requests[0].adapter, 24)[: len(ids[False][0])]


def test_the_end_of_a_beginning_is_forgotten_first(engine_with: Any, prompt: tuple[int, ...]) -> None:
    engine = engine_with(block_size=16)
    one(engine, prompt)
    engine.prefix.evict(20)
    assert cached(one(engine, prompt)) == 32
    engine.prefix.clear()
    assert engine.cache.used == 0
    assert cached(one(engine, prompt)) == 0


def test_blocks_give_way_to_requests(engine_with: Any, prompt: tuple[int, ...]) -> None:
    engine = engine_with(kv_cache_tokens=256, block_size=16)
    one(engine, prompt)
    assert len(engine.prefix) == 4
    request = Request("long", (9,) * 130, sampling=SamplingParams(max_new_tokens=2))
    answer = ask(engine, request)
    engine.step()
    assert (engine.cache.used, len(engine.prefix)) == (256, 0)
    finish(engine)
    assert answer.last.finish_reason is not None
