"""A replica answers as stock PEFT does alone, keeps its adapters within bounds, and refuses what it cannot serve."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from rayft.errors import UsageError
from rayft.inference.request import SamplingParams
from rayft.multilora.bank import AdapterState
from rayft.runs.registry import Registry
from rayft.serve.host_cache import size_of
from rayft.serve.job import Content, Conversation, Job, Piece
from rayft.serve.replica import Limits, Replica
from tests.inference.oracle import Reference, sharpened
from tests.multilora.kinds import CONFIGS, stock
from tests.serve.conftest import written

LONG = SamplingParams(1500, ignore_eos=True)


def job(prompt: Any, adapter: Content | None = None, sampling: SamplingParams | None = None, **fields: Any) -> Job:
    return Job(fields.pop("id", "job"), prompt, sampling or SamplingParams(12, ignore_eos=True), adapter, **fields)


async def collect(replica: Replica, job: Job) -> list[Piece]:
    return [piece async for pieces in replica.generate(job) for piece in pieces]


def text_of(pieces: Sequence[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)


async def until_idle(replica: Replica) -> None:
    while replica.engine.busy:
        await asyncio.sleep(0.005)


def test_answers_are_those_of_stock_peft(
    replica_with: Callable[..., Replica], contents: dict[str, Content], peft: Reference, tokenizer: Any
) -> None:
    prompts = {name: tuple(range(5, 9 + number)) for number, name in enumerate([None, *contents])}

    async def main() -> dict[str | None, list[Piece]]:
        replica = replica_with(max_loras=3)
        jobs = {name: job(prompt, contents[name] if name else None, id=str(name)) for name, prompt in prompts.items()}
        return dict(zip(jobs, await asyncio.gather(*(collect(replica, one) for one in jobs.values())), strict=True))

    for name, pieces in asyncio.run(main()).items():
        expected = tokenizer.decode(peft.answer(prompts[name], name, 12), skip_special_tokens=True)
        assert text_of(pieces) == expected
        assert pieces[-1].finish_reason == "length"
        assert pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 12


def test_adapters_of_every_kind_are_registered_and_served(
    replica_with: Callable[..., Replica], tiny_model_folder: str, tokenizer: Any, tmp_path: Path
) -> None:
    kinds = stock(lambda: sharpened(tiny_model_folder), CONFIGS, tmp_path)
    registry = Registry(tmp_path / "registry")
    versions = {name: registry.register("bot", tmp_path / name) for name in CONFIGS}
    assert {version.rank for version in versions.values()} == {2, 4}

    async def main() -> dict[str, list[Piece]]:
        replica = replica_with(Limits(host_cache=2**18), max_loras=5)
        jobs = [job((5, 6, 7), Content(v.hash, str(v.path)), id=name) for name, v in versions.items()]
        pieces = await asyncio.gather(*(collect(replica, one) for one in jobs))
        assert len(replica.cache.hashes) < len(versions)
        return dict(zip(versions, pieces, strict=True))

    for name, pieces in asyncio.run(main()).items():
        ids = kinds.models[name].generate(
            input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=12, eos_token_id=None, pad_token_id=0, do_sample=False
        )
        assert text_of(pieces) == tokenizer.decode(ids[0, 3:], skip_special_tokens=True), name


def test_several_answers_and_all_at_once(replica_with: Callable[..., Replica]) -> None:
    warm = SamplingParams(12, temperature=1.0, seed=5, ignore_eos=True)

    async def main() -> tuple[list[Piece], list[list[Piece]], list[Piece]]:
        replica = replica_with()
        three = await collect(replica, job((5, 6), sampling=warm, n=3))
        batches = [list(b) async for b in replica.generate(job((5, 6), sampling=warm, n=3, stream=False))]
        second = await collect(replica, job((5, 6), sampling=replace(warm, seed=6)))
        return three, batches, second

    three, batches, second = asyncio.run(main())
    answers = [text_of(three, index) for index in range(3)]
    assert len(set(answers)) == 3
    assert answers[1] == text_of(second)  # an answer's seed is the job's plus its number
    assert len(batches) == 1
    assert [text_of(batches[0], index) for index in range(3)] == answers


def test_who_closes_the_iterator_frees_everything(replica_with: Callable[..., Replica]) -> None:
    async def main() -> None:
        replica = replica_with(enable_prefix_caching=False)
        pieces = replica.generate(job((5,), sampling=LONG, n=2))
        await anext(pieces)
        await pieces.aclose()
        await until_idle(replica)
        assert replica.engine.cache.used == 0
        assert replica.engine.counters.completion_tokens < 1500

    asyncio.run(main())


def test_the_chat_template_is_the_adapters_own(
    replica_with: Callable[..., Replica], contents: dict[str, Content], tmp_path: Path, tokenizer: Any
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(contents["anna"].path, folder)
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    own.save_pretrained(folder)
    talk = Conversation(({"role": "user", "content": "Hello"},))
    mine = Content(contents["anna"].hash, str(folder))

    async def main() -> list[list[Piece]]:
        replica = replica_with()
        return [await collect(replica, job(talk, adapter)) for adapter in (None, contents["anna"], mine)]

    lengths = [pieces[-1].usage.prompt_tokens for pieces in asyncio.run(main()) if pieces[-1].usage]
    rendered = tokenizer.apply_chat_template(list(talk.messages), add_generation_prompt=True, return_dict=False)
    assert lengths[:2] == [len(rendered)] * 2
    assert lengths[2] == len(tokenizer("Hello!")["input_ids"])


def test_host_memory_stays_within_its_limit(replica_with: Callable[..., Replica], contents: dict[str, Content]) -> None:
    sizes = {name: size_of(AdapterState.read(content.path)) for name, content in contents.items()}
    limit = sizes["hugo"] + sizes["anna"]

    async def main() -> None:
        replica = replica_with(Limits(host_cache=limit), max_loras=2)
        for name in [*contents, *contents]:
            await collect(replica, job((5, 6), contents[name]))
            known = {name for name, content in contents.items() if content.hash in replica.cache.hashes}
            assert name in known
            assert sum(sizes[one] for one in known) <= limit
            assert {contents[one].hash for one in known} == set(replica.engine.adapters._adapters)

    asyncio.run(main())


def test_pinned_adapters_stay_and_unloaded_ones_go(
    replica_with: Callable[..., Replica], contents: dict[str, Content]
) -> None:
    async def main() -> None:
        replica = replica_with(Limits(host_cache=0), max_loras=3)
        await replica.load(contents["anna"], pinned=True)
        await collect(replica, job((5,), contents["bert"]))
        assert replica.cache.hashes == (contents["anna"].hash,)
        assert contents["anna"].hash in replica.engine.adapters.loaded
        running = replica.generate(job((5,), contents["anna"], LONG))
        await anext(running)
        await replica.unload(contents["anna"].hash)
        assert replica.cache.hashes == (contents["anna"].hash,)  # still in use
        await running.aclose()
        await until_idle(replica)
        assert replica.cache.hashes == ()
        assert not replica.engine.adapters.loaded
        await replica.unload("nobody")

    asyncio.run(main())


def test_an_adapter_is_read_once_for_all_who_ask(
    replica_with: Callable[..., Replica], contents: dict[str, Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = AdapterState.read
    monkeypatch.setattr(AdapterState, "read", staticmethod(lambda folder: (reads.append(folder), read(folder))[1]))

    async def main() -> None:
        replica = replica_with()
        await asyncio.gather(*(collect(replica, job((5,), contents["carl"], id=str(i))) for i in range(6)))

    asyncio.run(main())
    assert len(reads) == 1


def test_what_cannot_be_served_is_refused(
    replica_with: Callable[..., Replica], contents: dict[str, Content], peft: Reference, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(contents["emil"].path, broken)
    weights = broken / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    other = written(peft.states["bert"], tmp_path / "other")
    (tmp_path / "other/base.json").write_text('{"base_hash": "of another base"}')
    config = LoraConfig(r=4, target_modules=["q_proj"])
    tensors = {
        f"base_model.model.model.layers.99.self_attn.q_proj.lora_{letter}.weight": tensor
        for letter, tensor in zip("AB", list(peft.states["carl"].tensors.values())[:2], strict=True)
    }
    foreign = written(AdapterState(config, tensors), tmp_path / "foreign")
    cases = {
        "R801": Content(contents["emil"].hash, str(broken)),
        "R803: this adapter was": other,
        "R803: this adapter does": foreign,
        "R819: .* does not hold": Content(contents["emil"].hash, contents["fred"].path),
        "R819: the adapter's rank": contents["hugo"],
    }

    async def main() -> None:
        replica = replica_with(Limits(max_lora_rank=16, max_prompt_tokens=4), base_hash="of this base")
        for message, content in cases.items():
            with pytest.raises(UsageError, match=message):
                await collect(replica, job((5,), content))
        assert replica.cache.hashes == ()
        weights.write_bytes(whole)
        await collect(replica, job((5,), cases["R801"]))  # mended: the next request finds it
        with pytest.raises(UsageError, match="R812"):
            await collect(replica, job((5, 6, 7, 8, 9)))
        with pytest.raises(UsageError, match="R812"):
            await collect(replica, job((5,), sampling=SamplingParams(10_000)))
        full = await collect(replica, job((5,), sampling=replace(LONG, max_new_tokens=1), open_end=True))
        assert full[-1].usage is not None
        assert full[-1].usage.completion_tokens == replica.engine.max_model_len - 1

    asyncio.run(main())


def test_states_say_what_is_going_on(replica_with: Callable[..., Replica], contents: dict[str, Content]) -> None:
    async def main() -> None:
        replica = replica_with(max_loras=4)
        running = replica.generate(job((5, 6, 7), contents["gina"], LONG))
        await anext(running)
        (state,) = await replica.states()
        assert state.running == 1
        assert state.loaded == state.cached == (contents["gina"].hash,)
        assert 0 < state.kv_cache_usage < 1
        assert state.memory > 50e6
        await running.aclose()
        await until_idle(replica)
        (state,) = await replica.states()
        assert (state.running, state.waiting, state.prompt_tokens) == (0, 0, 3)
        card = await replica.card()
        assert card.parameters == sum(parameter.numel() for parameter in replica.engine.model.parameters())

    asyncio.run(main())
