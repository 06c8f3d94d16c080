"""Requests as async iterators, while a thread steps."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from rayft.errors import UsageError
from rayft.inference.request import Overloaded, Request, SamplingParams, TokenEvent
from rayft.inference.runner import Runner
from tests.inference.oracle import Reference, judged
from tests.inference.test_engine import is_empty


async def collect(runner: Runner, request: Request) -> list[TokenEvent]:
    return [event async for event in runner.submit(request)]


async def until_empty(engine: Any) -> None:
    end = time.monotonic() + 30
    while not is_empty(engine):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_many_iterators_at_once(engine_with: Any, peft: Reference) -> None:
    engine = engine_with(max_num_seqs=8, max_num_batched_tokens=64)
    requests = [
        Request(str(i), (5 + i, 6, 7), (None, "bert", "emil")[i % 3], sampling=SamplingParams(8, ignore_eos=True))
        for i in range(12)
    ]

    async def main() -> list[list[TokenEvent]]:
        with Runner(engine) as runner:
            first = await asyncio.gather(*(collect(runner, request) for request in requests[:6]))
            await asyncio.sleep(0.05)  # the thread has gone to sleep and is woken
            return [*first, *await asyncio.gather(*(collect(runner, request) for request in requests[6:]))]

    for request, events in zip(requests, asyncio.run(main()), strict=True):
        assert [event.finish_reason for event in events] == [None] * 7 + ["length"]
        ids = [event.token for event in events if event.token is not None]
        assert judged(ids, peft.logits(request.prompt, ids, request.adapter)).same
    assert is_empty(engine)


def test_a_name_changes_its_content_under_load_and_no_answer_mixes_versions(engine_with: Any, peft: Reference) -> None:
    engine = engine_with(max_num_seqs=6, max_num_batched_tokens=32, max_loras=2)
    versions = ("carl", "gina", "hugo")
    prompt = tuple(range(3, 40))
    asked: list[tuple[str, asyncio.Task[list[TokenEvent]]]] = []

    async def main() -> None:
        with Runner(engine) as runner:
            for i in range(30):
                version = versions[i % 3]
                await asyncio.to_thread(engine.register, peft.states[version], "live")
                for n in range(2):
                    request = Request(f"{i} {n}", (*prompt, 50 + i), "live", sampling=SamplingParams(6))
                    asked.append((version, asyncio.create_task(collect(runner, request))))
                await asyncio.sleep(0)  # the tasks ask while the name stands for this version
            await asyncio.gather(*(task for _, task in asked))

    asyncio.run(main())
    for version, task in asked:
        ids = [event.token for event in task.result() if event.token is not None]
        last = (*prompt, 50 + int(task.result()[0].id.split()[0]))
        assert judged(ids, peft.logits(last, ids, version)).same
    assert is_empty(engine)


def test_the_event_loop_is_free_while_the_model_computes(engine_with: Any) -> None:
    engine = engine_with()
    step = engine.step
    engine.step = lambda: (time.sleep(0.2), step())

    async def main() -> float:
        with Runner(engine) as runner:
            task = asyncio.create_task(collect(runner, Request("1", (5,), sampling=SamplingParams(3))))
            longest, last = 0.0, time.monotonic()
            while not task.done():
                await asyncio.sleep(0.001)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            return longest

    assert asyncio.run(main()) < 0.15


def test_who_stops_listening_frees_everything(engine_with: Any) -> None:
    engine = engine_with(enable_prefix_caching=False)
    endless = SamplingParams(1500, ignore_eos=True)

    async def main() -> list[TokenEvent]:
        with Runner(engine) as runner:
            task = asyncio.create_task(collect(runner, Request("gone", (5,), sampling=endless)))
            async for _ in (events := runner.submit(Request("closed", (6,), sampling=endless))):
                break
            await events.aclose()  # type: ignore[attr-defined]
            task.cancel()
            await until_empty(engine)
            listening = asyncio.create_task(collect(runner, Request("told", (5,), sampling=endless)))
            while not engine.busy:
                await asyncio.sleep(0.001)
            runner.cancel("told")
            events_of_told = await listening
            await until_empty(engine)
            return events_of_told

    assert asyncio.run(main())[-1].finish_reason == "cancelled"
    assert engine.counters.completion_tokens < 1500  # none of the three went on to its end


def test_errors_come_before_the_first_event(engine_with: Any) -> None:
    engine = engine_with(max_queued_tokens=1)

    async def main() -> None:
        runner = Runner(engine)  # not started: what is asked for waits
        with pytest.raises(UsageError, match="R815"):
            runner.submit(Request("1", (5,), "nobody"))
        runner.submit(Request("1", (5, 6), sampling=SamplingParams(1)))
        with pytest.raises(Overloaded):
            runner.submit(Request("2", (5,)))
        runner.start()
        await until_empty(engine)
        runner.stop()

    asyncio.run(main())


def test_a_failing_step_ends_its_requests_and_not_the_runner(engine_with: Any) -> None:
    engine = engine_with(enable_prefix_caching=False)
    forward = engine.model.forward

    def broken(**arguments: Any) -> Any:
        engine.model.forward = forward
        raise RuntimeError("out of memory")

    async def main() -> list[list[TokenEvent]]:
        engine.model.forward = broken
        with Runner(engine) as runner:
            failed = await collect(runner, Request("1", (5,), "anna", sampling=SamplingParams(2)))
            assert runner.error is not None
            return [failed, await collect(runner, Request("2", (5,), "anna", sampling=SamplingParams(2)))]

    failed, answered = asyncio.run(main())
    engine.model.__dict__.pop("forward", None)
    assert [(event.finish_reason, event.error) for event in failed] == [("error", "RuntimeError: out of memory")]
    assert answered[-1].finish_reason is not None and answered[-1].error is None
    assert is_empty(engine)


def test_a_closed_event_loop_disturbs_nobody(engine_with: Any) -> None:
    engine = engine_with(enable_prefix_caching=False)
    with Runner(engine) as runner:

        async def ask_and_leave() -> None:
            runner.submit(Request("left", (5,), sampling=SamplingParams(1500, ignore_eos=True)))

        asyncio.run(ask_and_leave())

        async def stay() -> list[TokenEvent]:
            events = await collect(runner, Request("stays", (6,), sampling=SamplingParams(5, ignore_eos=True)))
            await until_empty(engine)
            return events

        assert asyncio.run(stay())[-1].finish_reason == "length"
        assert runner.error is None


def test_after_the_end_nobody_waits_for_ever(engine_with: Any) -> None:
    engine = engine_with()
    endless = SamplingParams(1500, ignore_eos=True)

    async def main() -> list[list[TokenEvent]]:
        with Runner(engine) as runner:
            before = asyncio.create_task(collect(runner, Request("before", (5,), sampling=endless)))
            await asyncio.sleep(0.05)
        after = collect(runner, Request("after", (5,), sampling=endless))
        return [await asyncio.wait_for(before, 5), await asyncio.wait_for(after, 5)]

    before, after = asyncio.run(main())
    assert before[-1].finish_reason == "error" and before[-1].error == "the engine was stopped"
    assert after[-1].finish_reason == "cancelled"
    assert is_empty(engine)
