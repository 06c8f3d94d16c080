"""The engine against stock PEFT, one request at a time: what a neighbour does changes no answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.inference.request import Overloaded, Request, SamplingParams, TokenEvent
from tests.inference.conftest import RANKS
from tests.inference.oracle import Reference, judged, random_prompt, sharpened


@dataclass
class Answer:
    """What came back for one request."""

    events: list[TokenEvent] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def last(self) -> TokenEvent:
        return self.events[-1]


def ask(engine: Engine, request: Request) -> Answer:
    answer = Answer()
    engine.add(request, answer.events.append)
    return answer


def finish(engine: Engine) -> int:
    """The number of steps that it took."""
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    return steps


def is_empty(engine: Engine) -> bool:
    """Whether nothing is held for any request, apart from the prefix cache."""
    blocks = len(engine.prefix) * engine.settings.block_size if engine.prefix else 0
    held = engine.cache.used - blocks, engine.cache.nbytes, engine.queued_tokens, len(engine.scheduler.running)
    return held == (0, 0, 0, 0) and not engine.busy and len(engine.scheduler.queue) == 0


def random_requests(count: int, vocabulary: int, seed: int = 1) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for number in range(count):
        adapter = [None, *RANKS][int(torch.randint(1 + len(RANKS), (), generator=generator))]
        stop = ((), (), ("e", "Pa"), ("er", "the"))[int(torch.randint(4, (), generator=generator))]
        end_token = tuple(torch.randint(vocabulary, (3,), generator=generator).tolist())
        sampling = SamplingParams(
            max_new_tokens=int(torch.randint(1, 13, (), generator=generator)),
            stop=stop,
            stop_token_ids=end_token if number % 3 == 0 else (),
        )
        prompt = random_prompt(generator, vocabulary, 60 if number % 10 else 200)
        requests.append(Request(str(number), prompt, adapter, sampling=sampling))
    return requests


def check_end(answer: Answer, request: Request, tokenizer: Any) -> None:
    """An answer ends where its first end token, stop text or its length ends it, and its text says so."""
    ids, sampling = answer.ids, request.sampling
    ends = {tokenizer.eos_token_id, *sampling.stop_token_ids}
    before = tokenizer.decode(ids[:-1], skip_special_tokens=True)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert not ends.intersection(ids[:-1])
    assert not any(mark in before for mark in sampling.stop)
    assert answer.last.usage is not None
    assert answer.last.usage.completion_tokens == len(ids)
    assert answer.last.usage.prompt_tokens == len(request.prompt)
    if answer.last.finish_reason == "length":
        assert len(ids) == sampling.max_new_tokens and answer.text == whole
    elif ids[-1] in ends:
        assert answer.text == before
    else:
        assert answer.last.finish_reason == "stop"
        assert answer.text == whole[: min(whole.index(mark) for mark in sampling.stop if mark in whole)]


def random_mix(engine: Engine, peft: Reference, tokenizer: Any, count: int) -> None:
    requests = random_requests(count, len(tokenizer))
    generator = torch.Generator().manual_seed(2)
    answers: dict[str, Answer] = {}
    waiting = list(requests)
    cancelled = set()
    while waiting or engine.busy:
        for _ in range(int(torch.randint(4, (), generator=generator))):
            if waiting:
                request = waiting.pop(0)
                answers[request.id] = ask(engine, request)
        in_flight = [id for id, answer in answers.items() if not answer.events or answer.last.finish_reason is None]
        if in_flight and int(torch.randint(8, (), generator=generator)) == 0:
            id = in_flight[int(torch.randint(len(in_flight), (), generator=generator))]
            engine.cancel(id)
            cancelled.add(id)
            assert answers[id].last.finish_reason == "cancelled"
        engine.step()
    assert is_empty(engine)
    assert len(cancelled) > count // 50
    usages = [answer.last.usage for answer in answers.values()]
    assert engine.counters.completion_tokens == sum(len(answer.ids) for answer in answers.values())
    assert engine.counters.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert engine.counters.cached_tokens == sum(usage.cached_tokens for usage in usages if usage)
    undecided = 0
    changed = {name: [0, 0] for name in RANKS}
    for request in sorted(requests, key=lambda r: r.adapter or ""):
        answer = answers[request.id]
        if request.id not in cancelled:
            check_end(answer, request, tokenizer)
        if not answer.ids:
            continue
        verdict = judged(answer.ids, peft.logits(request.prompt, answer.ids, request.adapter))
        assert verdict.same, f"request {request.id} is not answered as by PEFT alone"
        undecided += verdict.undecided
        if request.adapter is not None and len(answer.ids) >= 3:
            changed[request.adapter][0] += not judged(answer.ids, peft.logits(request.prompt, answer.ids, None)).same
            changed[request.adapter][1] += 1
    assert undecided <= max(1, count // 1000)
    assert all(different > asked / 2 > 1 for different, asked in changed.values()), changed


def test_a_random_mix_is_answered_as_by_peft_alone(engine_with: Any, peft: Reference, tokenizer: Any) -> None:
    engine = engine_with(max_num_seqs=16, max_num_batched_tokens=96, max_loras=8)
    random_mix(engine, peft, tokenizer, 200)


@pytest.mark.slow
def test_a_thousand_mixed_requests(engine_with: Any, peft: Reference, tokenizer: Any) -> None:
    engine = engine_with(max_num_seqs=24, max_num_batched_tokens=128, max_loras=5)
    random_mix(engine, peft, tokenizer, 1000)


def test_the_oracle_agrees_with_generate(peft: Reference, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for adapter in (None, "bert", "gina"):
        prompt = random_prompt(generator, len(tokenizer), 30)
        answer = peft.answer(prompt, adapter, 6)
        assert judged(answer, peft.logits(prompt, answer, adapter)).same
        wrong = [*answer[:5], (answer[5] + 1) % len(tokenizer)]
        assert not judged(wrong, peft.logits(prompt, wrong, adapter)).same


def test_strength_scales_the_adapter(engine_with: Any, peft: Reference, tokenizer: Any) -> None:
    engine = engine_with()
    generator = torch.Generator().manual_seed(4)
    prompts = [random_prompt(generator, len(tokenizer), 20) for _ in range(6)]
    strengths = (0.0, 0.5, 1.0)
    answers = [
        [ask(engine, Request(f"{i} {s}", prompt, "emil", s, SamplingParams(max_new_tokens=6))) for s in strengths]
        for i, prompt in enumerate(prompts)
    ]
    finish(engine)
    layers = [module for module in peft.model.modules() if "emil" in getattr(module, "lora_A", {})]
    different = 0
    for prompt, (none, half, full) in zip(prompts, answers, strict=True):
        assert judged(none.ids, peft.logits(prompt, none.ids, None)).same
        assert judged(full.ids, peft.logits(prompt, full.ids, "emil")).same
        for layer in layers:
            layer.scaling["emil"] /= 2
        assert judged(half.ids, peft.logits(prompt, half.ids, "emil")).same
        for layer in layers:
            layer.scaling["emil"] *= 2
        different += half.ids not in (none.ids, full.ids)
    assert different > 2


def test_adapters_compute_in_the_number_format_of_the_base(
    tiny_model_folder: str, peft: Reference, tokenizer: Any
) -> None:
    engine = Engine(sharpened(tiny_model_folder).to(torch.bfloat16), tokenizer)
    engine.register(peft.states["hugo"], "hugo")
    prompt = random_prompt(torch.Generator().manual_seed(4), len(tokenizer), 60)
    answer = ask(engine, Request("1", prompt, "hugo", sampling=SamplingParams(10, logprobs=True)))
    finish(engine)
    (slot,) = engine.mlora.slots
    held = [layer.weights[slot] for layer in engine.mlora._layers.values() if slot in layer.weights]
    assert {tensor.dtype for weights in held for tensor in (weights.A, weights.B)} == {torch.bfloat16}

    def distance(adapter: str | None) -> float:
        expected = peft.logits(prompt, answer.ids, adapter).log_softmax(-1)
        own = expected.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        return float((own - torch.tensor([event.logprob for event in answer.events])).abs().mean())

    assert distance("hugo") < 0.3 < 1 < distance(None)


def test_a_mix_in_bf16_is_answered_as_by_peft_in_bf16(tiny_model_folder: str, peft: Reference, tokenizer: Any) -> None:
    """What a CPU computes otherwise than in fp32: weights that are laid out for it, attention of many by matmuls."""
    engine = Engine(sharpened(tiny_model_folder).to(torch.bfloat16), tokenizer)
    for name, state in peft.states.items():
        engine.register(state, name)
    generator = torch.Generator().manual_seed(6)
    names = [None, *RANKS] * 2
    prompts = [random_prompt(generator, len(tokenizer), 40) for _ in names]
    sampling = SamplingParams(12, logprobs=True, ignore_eos=True)
    answers = [
        ask(engine, Request(str(number), prompt, name, sampling=sampling))
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    finish(engine)
    off, other = [], []
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        reported = torch.tensor([event.logprob for event in answer.events])

        def distance(adapter: str | None, prompt: Any = prompt, answer: Any = answer, own: Any = reported) -> float:
            logprobs = peft.logits(prompt, answer.ids, adapter).log_softmax(-1)
            return float((logprobs.gather(1, torch.tensor(answer.ids)[:, None])[:, 0] - own).abs().mean())

        off.append(distance(name))
        other.append(distance("hugo" if name != "hugo" else "anna"))
    assert max(off) < 0.5 < sum(other) / len(other)
    assert sum(off) / len(off) < 0.15


def test_cancel_frees_everything_at_once(engine_with: Any, tokenizer: Any) -> None:
    engine = engine_with(enable_prefix_caching=False, max_num_seqs=4)
    sampling = SamplingParams(max_new_tokens=50)
    answers = {str(i): ask(engine, Request(str(i), (5,) * 70, "anna", sampling=sampling)) for i in range(6)}
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) == 4
    used = engine.cache.used
    engine.cancel("1")  # runs
    assert engine.cache.used == used * 3 // 4
    engine.cancel("5")  # waits
    assert engine.queued_tokens == 70
    engine.cancel("nobody")
    for id in ("1", "5"):
        assert answers[id].last.finish_reason == "cancelled"
    for id in ("0", "2", "3", "4"):
        engine.cancel(id)
    assert is_empty(engine)
    assert all(answer.last.usage is not None for answer in answers.values())
    assert not any(adapter.users or adapter.holders for adapter in engine.adapters._adapters.values())


def test_a_full_cache_preempts_and_answers_stay_the_same(engine_with: Any, peft: Reference, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    engine = engine_with(kv_cache_tokens=272, max_num_seqs=4, max_num_batched_tokens=64)
    requests = [
        Request(str(i), random_prompt(generator, len(tokenizer), 50), name, sampling=SamplingParams(max_new_tokens=60))
        for i, name in enumerate([None, "bert", "fred", "hugo", "anna", "bert"])
    ]
    answers = [ask(engine, request) for request in requests]
    while engine.busy:
        engine.step()
        assert engine.cache.used <= 272
    assert engine.scheduler.preemptions > 0
    assert is_empty(engine)
    for request, answer in zip(requests, answers, strict=True):
        check_end(answer, request, tokenizer)
        assert judged(answer.ids, peft.logits(request.prompt, answer.ids, request.adapter)).same


@pytest.mark.parametrize(
    ("request_", "id"),
    [
        (Request("x", (5,) * 2048), "R812"),
        (Request("x", (5,), sampling=SamplingParams(max_new_tokens=600)), "R812"),
        (Request("x", (5, 100000)), "R811"),
        (Request("x", (5, -1)), "R811"),
        (Request("x", (5,), sampling=SamplingParams(logit_bias={99999: 1.0})), "R811"),
        (Request("x", (5,), "nobody"), "R815"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine_with: Any, request_: Request, id: str) -> None:
    engine = engine_with(kv_cache_tokens=512)
    with pytest.raises(UsageError) as error:
        ask(engine, request_)
    assert error.value.id == id
    assert is_empty(engine)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"min_tokens": 129},
        {"top_logprobs": 21},
        {"stop": ("",)},
        {"logit_bias": {3: float("inf")}},
    ],
)
def test_a_value_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))) as error:
        SamplingParams(**arguments)
    assert error.value.id == "R811"


def test_too_much_that_waits_is_refused(engine_with: Any) -> None:
    engine = engine_with(max_queued_tokens=100)
    ask(engine, Request("1", (5,) * 101))
    with pytest.raises(UsageError, match="in flight"):
        ask(engine, Request("1", (5,)))
    with pytest.raises(Overloaded) as error:
        ask(engine, Request("2", (5,)))
    assert error.value.id == "R813"
    engine.step()
    answer = ask(engine, Request("2", (5,), sampling=SamplingParams(max_new_tokens=1)))
    finish(engine)
    assert answer.last.finish_reason is not None
