"""Far more adapters than memory holds, on one replica."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rayft.inference.request import SamplingParams
from rayft.multilora.bank import AdapterState
from rayft.serve.job import Content, Job
from rayft.serve.replica import Limits, Replica
from tests.inference.oracle import Reference
from tests.serve.conftest import written

LIMIT = 32 * 2**20


@pytest.mark.slow
def test_two_thousand_adapters_take_no_more_memory_than_they_may(
    replica_with: Callable[..., Replica], peft: Reference, tmp_path: Path
) -> None:
    state = peft.states["hugo"]
    contents: list[Content] = []
    for number in range(2000):
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(t.shape, generator=generator) * 0.05 for name, t in state.tensors.items()}
        contents.append(written(AdapterState(state.config, tensors), tmp_path / str(number)))
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size * len(contents) > 5 * LIMIT

    async def main() -> int:
        replica = replica_with(Limits(host_cache=LIMIT), max_loras=8)

        async def ask(number: int, content: Content) -> None:
            async for _ in replica.generate(Job(str(number), (5, 6), SamplingParams(1), content)):
                pass

        async def ask_all(order: list[Content]) -> int:
            """The most memory on the way."""
            most = 0
            for start in range(0, len(order), 20):
                await asyncio.gather(*(ask(start + at, one) for at, one in enumerate(order[start : start + 20])))
                most = max(most, psutil.Process().memory_info().rss)
            return most

        await ask_all(contents[:100])  # what serving takes, whatever the number of adapters
        for content in contents[:100]:
            await replica.unload(content.hash)
        gc.collect()
        before = psutil.Process().memory_info().rss
        highest = await ask_all([*contents, *random.Random(0).choices(contents, k=500)])
        assert len(replica.cache.hashes) <= LIMIT // size + 20
        return highest - before

    grown = asyncio.run(main())
    shutil.rmtree(tmp_path)  # gigabytes
    assert grown < 1.1 * LIMIT, f"{grown / 2**20:.1f} MiB"
