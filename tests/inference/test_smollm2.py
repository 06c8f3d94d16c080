"""The real model, in fp32: every answer of a mix is the one that stock PEFT gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayft.inference.engine import Engine
from rayft.inference.request import Request, SamplingParams
from rayft.inference.settings import EngineSettings
from rayft.models.hub import fetch
from tests.inference.oracle import Reference, judged, random_prompt, reference
from tests.inference.test_engine import ask, finish

RANKS = {"one": 4, "two": 8, "three": 16, "four": 32}


def check_mix(count: int, tokens: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch("smollm2-135m-instruct")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    peft: Reference = reference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), RANKS)
    engine = Engine(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, EngineSettings(max_num_seqs=12)
    )
    for name, state in peft.states.items():
        engine.register(state, name)
    generator = torch.Generator().manual_seed(1)
    names = [None, *RANKS]
    requests = [
        Request(
            str(number),
            random_prompt(generator, 40_000, 40),
            names[number % len(names)],
            sampling=SamplingParams(tokens, ignore_eos=True),
        )
        for number in range(count)
    ]
    answers = [ask(engine, request) for request in requests[: count // 2]]
    for request in requests[count // 2 :]:  # the other half comes one by one
        engine.step()
        answers.append(ask(engine, request))
    finish(engine)
    undecided = changed = 0
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.ids) == tokens
        verdict = judged(answer.ids, peft.logits(request.prompt, answer.ids, request.adapter))
        assert verdict.same, f"request {request.id} is not answered as by PEFT alone"
        undecided += verdict.undecided
        if request.adapter is not None:
            changed += not judged(answer.ids, peft.logits(request.prompt, answer.ids, None)).same
    assert undecided <= 1
    assert changed > sum(request.adapter is not None for request in requests) / 2


@pytest.mark.smollm2
def test_24_requests_of_16_tokens() -> None:
    check_mix(24, 16)


@pytest.mark.smollm2
@pytest.mark.slow
def test_100_requests_of_64_tokens() -> None:
    check_mix(100, 64)
