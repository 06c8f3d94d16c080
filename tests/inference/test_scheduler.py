"""Who is computed when: shares, bounds on waiting, priorities. The clock is ours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.inference.fair_queue import FairQueue
from rayft.inference.flight import Flight
from rayft.inference.request import Request, SamplingParams, TokenEvent
from tests.inference.oracle import Reference, judged, random_prompt
from tests.inference.test_engine import Answer, ask, finish


class Clock:
    """Goes on by `tick` seconds per step."""

    def __init__(self, tick: float = 0.1) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        return self.now

    def step(self, engine: Engine) -> None:
        engine.step()
        self.now += self.tick


def request(id: str, adapter: str | None, tokens: int, prompt: tuple[int, ...] = (5, 6, 7), **more: Any) -> Request:
    return Request(id, prompt, adapter, sampling=SamplingParams(max_new_tokens=tokens, ignore_eos=True), **more)


def waited(engine: Engine, clock: Clock, asked: Request, hot: Any) -> float:
    """Seconds from asking to the first token, while ``hot(engine)`` asks for more before every step."""
    start, answer = clock.now, ask(engine, asked)
    while not answer.events:
        hot(engine)
        clock.step(engine)
        assert clock.now - start < 30
    return clock.now - clock.tick - start


def test_a_cold_adapter_waits_at_most_the_bound_when_every_place_is_taken(engine_with: Any, peft: Reference) -> None:
    clock = Clock()
    engine = engine_with(clock, max_num_seqs=4, max_num_batched_tokens=16, longest_wait=2.0)
    hot = [ask(engine, request(f"hot {i}", "anna", 200)) for i in range(99)]
    for _ in range(5):
        clock.step(engine)
    cold = request("cold", "bert", 5)
    assert 1.0 < waited(engine, clock, cold, lambda engine: None) <= 2.0 + clock.tick
    assert engine.scheduler.preemptions == 1
    victim = next(answer for answer in hot if answer.events and answer.events[0].id == "hot 3")
    before = len(victim.events)
    for i in range(99):
        if i != 3:
            engine.cancel(f"hot {i}")
    finish(engine)
    assert len(victim.events) == 200 > before
    ids = victim.ids
    assert judged(ids, peft.logits((5, 6, 7), ids, "anna")).same  # its place was taken and given back, nothing else


def test_a_cold_adapter_gets_the_only_slot_within_the_bound(engine_with: Any) -> None:
    clock = Clock()
    engine = engine_with(clock, max_num_seqs=4, max_num_batched_tokens=16, max_loras=1, longest_wait=2.0)
    hot: list[Answer] = []

    def more(engine: Engine) -> None:
        hot.append(ask(engine, request(f"hot {len(hot)}", "anna", 6)))

    for _ in range(30):
        more(engine)
        clock.step(engine)
    for name in ("carl", "dora", "carl"):
        assert waited(engine, clock, request(name, name, 3), more) <= 2.0 + clock.tick
        for _ in range(30):
            more(engine)
            clock.step(engine)
    finish(engine)
    assert {len(answer.ids) for answer in hot} == {6}


def test_a_cold_adapter_does_not_wait_behind_a_queue(engine_with: Any) -> None:
    clock = Clock()
    engine = engine_with(clock, max_num_seqs=4, max_num_batched_tokens=16)
    for i in range(200):
        ask(engine, request(f"hot {i}", "anna", 4))
    for _ in range(3):
        clock.step(engine)
    assert waited(engine, clock, request("cold", "bert", 5), lambda engine: None) <= 0.5
    assert engine.scheduler.preemptions == 0


def test_a_short_prompt_does_not_wait_for_a_long_one(engine_with: Any) -> None:
    clock = Clock()
    engine = engine_with(clock, max_num_seqs=4, max_num_batched_tokens=16)
    long = ask(engine, request("long", "anna", 2, (5,) * 1500))
    clock.step(engine)
    assert waited(engine, clock, request("short", "bert", 1), lambda engine: None) <= 2 * clock.tick
    assert not long.events


def test_tenants_get_the_same_number_of_tokens(engine_with: Any) -> None:
    engine = engine_with(max_num_seqs=4, max_num_batched_tokens=64)
    served: Counter[str] = Counter()

    def count(event: TokenEvent) -> None:
        served[event.id.split()[0]] += 1

    for i in range(120):  # one asks for many long answers, one for short ones
        engine.add(request(f"greedy {i}", None, 40, (5,), tenant="greedy"), count)
    for i in range(400):
        engine.add(request(f"modest {i}", None, 5, (5,), tenant="modest"), count)
    for _ in range(150):
        engine.step()
    assert 0.7 < served["modest"] / served["greedy"] < 1.1  # 5 of 6 tokens are counted here, and 40 of 41


def test_the_more_urgent_goes_first_and_gives_way_last(engine_with: Any) -> None:
    engine = engine_with(max_num_seqs=1, max_num_batched_tokens=8)
    ended: list[str] = []

    def end(event: TokenEvent) -> None:
        if event.finish_reason:
            ended.append(event.id)

    for i, priority in enumerate((3, 1, 2, 1)):
        engine.add(request(f"{priority} {i}", None, 3, priority=priority), end)
    finish(engine)
    assert ended == ["1 1", "1 3", "2 2", "3 0"]
    engine = engine_with(max_num_seqs=3, max_num_batched_tokens=64, kv_cache_tokens=208)
    for priority in (2, 0, 1):  # three slabs of 64 tokens fit, and not three of 80
        engine.add(request(f"{priority}", None, 40, (5,) * 40, priority=priority), end)
    while engine.scheduler.preemptions == 0:
        engine.step()
    assert [flight.request.priority for flight in engine.scheduler.queue] == [2]
    finish(engine)


def test_adapters_come_and_go_and_pins_stay(engine_with: Any, peft: Reference, tokenizer: Any) -> None:
    engine = engine_with(max_loras=2)
    generator = torch.Generator().manual_seed(1)
    engine.pin("anna")
    answers: list[tuple[Request, Answer]] = []
    for i, name in enumerate(["bert", "carl", "anna", "carl", "dora", None, "bert"]):
        asked = Request(str(i), random_prompt(generator, len(tokenizer), 20), name, sampling=SamplingParams(6))
        answers.append((asked, ask(engine, asked)))
    while engine.busy:
        engine.step()
        assert len(engine.adapters.loaded) <= 2
        assert engine.adapters.known("anna") in engine.adapters.loaded
    for asked, answer in answers:
        assert judged(answer.ids, peft.logits(asked.prompt, answer.ids, asked.adapter)).same
    with pytest.raises(UsageError, match="R816"):
        engine.pin("bert")  # the last slot stays for all others
    engine.pin("anna", pinned=False)
    engine.pin("bert")
    engine.pin("bert", pinned=False)
    last = ask(engine, request("last", "bert", 4))
    hash = engine.adapters.known("bert")
    engine.step()
    engine.forget("bert")
    assert hash in engine.adapters.loaded
    with pytest.raises(UsageError, match="R815"):
        ask(engine, request("too late", "bert", 4))
    finish(engine)
    assert last.last.finish_reason == "length"
    assert hash not in engine.adapters.loaded


def flight(flow: str, tokens: int) -> Flight:
    asked = Request("any", (1,), sampling=SamplingParams(tokens - 1), tenant=flow)
    nothing: Any = None
    return Flight(asked, None, nothing, nothing, frozenset(), print, 0.0)


def test_who_comes_late_neither_catches_up_nor_stands_back() -> None:
    queue = FairQueue()
    for _ in range(60):
        queue.push(flight("early", 10))

    def served(count: int) -> str:
        order = ""
        for _ in range(count):
            head = queue.next()
            assert head is not None
            queue.charge(head)
            order += head.request.tenant[0]
        return order

    assert served(20) == "e" * 20
    for _ in range(40):
        queue.push(flight("late", 20))
    assert served(30).count("l") in (9, 10, 11)  # two of ten tokens for one of twenty
    while (head := queue.next({("early", None)})) is not None:
        queue.remove(head)
    served(5)
    queue.push(flight("late", 20))
    assert "l" in served(3)
    assert queue.tokens == len(queue)
    again = flight("again", 1000)
    again.number = 1  # was preempted: has paid
    queue.push(again)
    queue.push(flight("again", 10))
    assert served(4).count("a") == 2
