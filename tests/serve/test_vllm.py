"""rayft's HTTP side before a real vLLM on this machine's CPU. RAYFT_VLLM_PYTHON names an interpreter that has vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayft.serve.assemble import assemble
from rayft.serve.job import Content
from rayft.serve.plan import Plan, plan
from rayft.serve.vllm_adapters import name_of
from rayft.serve.vllm_loading import VllmReplica, attached, vllm_replica
from tests.inference.oracle import Reference, reference, sharpened
from tests.serve.conftest import written

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RAYFT_VLLM_PYTHON" not in os.environ, reason="RAYFT_VLLM_PYTHON names no Python with vLLM"),
]

RANKS = {"anna": 1, "bert": 4, "carl": 16}
PROMPTS = [tuple(range(5 + number, 12 + 5 * number)) for number in range(6)]
LONG = tuple(5 + (7 * number) % 370 for number in range(300))
"""More than two blocks of vLLM's prefix cache on a CPU, which have 128 tokens."""
TOKENS = 12


@dataclass
class Here:
    """A vLLM of this session, and what stock PEFT answers."""

    plan: Plan
    replica: VllmReplica
    peft: Reference
    contents: dict[str, Content]
    folder: Path

    def expected(self, prompt: tuple[int, ...], adapter: str | None) -> str:
        ids = self.peft.answer(prompt, adapter, TOKENS)
        return str(self.replica.voices.base.tokenizer.decode(ids, skip_special_tokens=True))

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Of an HTTP side that is attached to this vLLM. Each has its own connections, and finds what is loaded."""
        backend = attached(self.plan, self.replica.process.url)
        transport = httpx.ASGITransport(app=assemble(self.plan, backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            yield client
        await backend.close()


@pytest.fixture(scope="module")
def here(tiny_model_factory: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    path = tmp_path_factory.mktemp("vllm")
    made = tiny_model_factory(hidden_size=128, num_hidden_layers=2)  # heads of 32 numbers: vLLM takes no smaller ones
    base, folder = sharpened(made), path / "tiny"
    shutil.copytree(made, folder)
    base.save_pretrained(folder)
    peft = reference(base, RANKS)
    contents = {name: written(state, path / "adapters" / name) for name, state in peft.states.items()}
    serve = {
        "backend": "vllm",
        "vllm_python": os.environ["RAYFT_VLLM_PYTHON"],
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_loras": 3,
        "max_lora_rank": 16,
        "roots": [str(path / "adapters")],
    }
    model = {"base": str(folder), "dtype": "fp32"}
    planned = plan([{"storage": str(path / "runs"), "model": model, "data": {"train": "none"}, "serve": serve}])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    replica = asyncio.run(vllm_replica(planned, "cpu", 1))
    yield Here(planned, replica, peft, contents, path)
    replica.process.close()


async def answer(client: httpx.AsyncClient, model: str, prompt: tuple[int, ...], **fields: Any) -> str:
    body = {"model": model, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    reply = await client.post("/v1/completions", json=body | fields)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


async def add(client: httpx.AsyncClient, name: str, source: str) -> httpx.Response:
    return await client.post("/v1/adapters", json={"name": name, "source": source, "promote": True})


def test_answers_in_a_mixed_batch_are_those_of_stock_peft(here: Here) -> None:
    """The base's rows too, which vLLM's CPU build would compute with the last adapter."""

    async def main() -> dict[tuple[str, tuple[int, ...]], str]:
        async with here.client() as client:
            for name, content in here.contents.items():
                assert (await add(client, name, content.path)).status_code == 200
            jobs = [(name, prompt) for prompt in PROMPTS for name in ("tiny", *RANKS)]
            return dict(zip(jobs, await asyncio.gather(*(answer(client, *job) for job in jobs)), strict=True))

    answers = asyncio.run(main())
    for (name, prompt), text in answers.items():
        assert text == here.expected(prompt, None if name == "tiny" else name)
    assert len(set(answers.values())) == len(answers)


def test_an_alias_is_swapped_and_back(here: Here) -> None:
    async def main() -> list[str]:
        async with here.client() as client:
            answers = []
            for name in ("bert", "carl"):
                assert (await add(client, "swapped", here.contents[name].path)).status_code == 200
                answers.append(await answer(client, "swapped", PROMPTS[0]))
            await client.post("/v1/adapters/swapped/rollback")
            return [*answers, await answer(client, "swapped", PROMPTS[0])]

    old, new = (here.expected(PROMPTS[0], name) for name in ("bert", "carl"))
    assert old != new
    assert asyncio.run(main()) == [old, new, old]


def test_other_content_under_the_same_path_is_never_answered_from_old_caches(here: Here) -> None:
    folder = here.folder / "adapters" / "changing"
    written(here.peft.states["anna"], folder)

    async def main() -> list[str]:
        async with here.client() as client:
            assert (await add(client, "changing", str(folder))).status_code == 200
            answers = [await answer(client, "changing", LONG)]
            body = {"model": "changing", "prompt": list(LONG), "max_tokens": 1, "temperature": 0}
            usage = (await client.post("/v1/completions", json=body)).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= 128
            written(here.peft.states["carl"], folder)
            assert (await add(client, "changing", str(folder))).status_code == 200
            return [*answers, await answer(client, "changing", LONG)]

    old, new = (here.expected(LONG, name) for name in ("anna", "carl"))
    assert old != new
    assert asyncio.run(main()) == [old, new]


def test_streams_forms_and_refusals(here: Here) -> None:
    dora = here.folder / "adapters" / "dora"
    shutil.copytree(here.contents["bert"].path, dora)
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))

    async def main() -> None:
        async with here.client() as client:
            await add(client, "anna", here.contents["anna"].path)
            fields = {"model": "anna", "prompt": list(PROMPTS[1]), "max_tokens": TOKENS, "temperature": 0}
            stream = await client.post("/v1/completions", json=fields | {"ignore_eos": True, "stream": True})
            chunks = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
            assert chunks.pop() == "[DONE]"
            text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
            assert text == here.expected(PROMPTS[1], "anna")
            talk = {"model": "anna", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
            form = {"structured_outputs": {"choice": ["pizza", "Paris"]}, "logprobs": True, "top_logprobs": 2}
            choice = (await client.post("/v1/chat/completions", json=talk | form)).json()["choices"][0]
            assert choice["message"]["content"] in ("pizza", "Paris")
            assert choice["finish_reason"] == "stop"
            assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
            warm = fields | {"temperature": 1, "seed": 5, "n": 3, "ignore_eos": True}
            first, again = [(await client.post("/v1/completions", json=warm)).json() for _ in range(2)]
            assert [c["text"] for c in first["choices"]] == [c["text"] for c in again["choices"]]
            assert len({c["text"] for c in first["choices"]}) == 3
            assert first["usage"]["completion_tokens"] == 3 * TOKENS
            refused = await add(client, "dora", str(dora))
            assert refused.status_code == 400 and "R866" in refused.text
            strong = await client.post("/v1/completions", json=fields | {"lora_strength": 0.5})
            assert strong.status_code == 400 and "R866" in strong.text
            assert (await client.get("/health")).status_code == 200
            info = (await client.get("/model_info")).json()
            assert info["parameters"] == here.replica.facts.parameters
            assert name_of(here.contents["anna"].hash) in {entry["id"] for entry in await here.replica.client.models()}
        await here.replica.client.close()

    asyncio.run(main())
