"""One replica of a tiny model with adapters, and HTTP servers over it: real sockets, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from transformers import AutoTokenizer

from rayft.config.recipe import Recipe
from rayft.config.serve import Serve
from rayft.inference.settings import EngineSettings
from rayft.multilora.bank import AdapterState
from rayft.serve.app import build
from rayft.serve.job import Content
from rayft.serve.names import FixedNames
from rayft.serve.plan import Plan
from rayft.serve.replica import Replica
from tests.inference.oracle import reference, sharpened

RANKS = {"anna": 2, "bert": 4, "carl": 8}
BASE = "tiny"


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


@dataclass
class World:
    """What the tests of the routes share."""

    loop: Loop
    replica: Replica
    adapters: Mapping[str, Content]
    tokenizer: Any

    @property
    def names(self) -> FixedNames:
        return FixedNames(BASE, self.adapters)

    def app(self, serve: Serve | None = None, **arguments: Any) -> FastAPI:
        arguments = {"backend": self.replica, "names": self.names} | arguments
        return build(serve or Serve(), **arguments)

    @contextlib.contextmanager
    def listening(self, app: FastAPI) -> Iterator[str]:
        """The URL of a server of this application."""
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        task = asyncio.run_coroutine_threadsafe(server.serve(), self.loop.loop)
        while not server.started:
            assert not task.done(), task.exception()
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = server.force_exit = True
            task.result(30)

    def idle(self) -> bool:
        """Nothing runs, waits or holds a place in the cache."""
        engine = self.replica.engine
        return not engine.busy and engine.cache.used == 0


def planned(folder: Path, **serve: Any) -> Plan:
    """For `assemble`: a registry, runs and logs in ``folder``, and these keys of the recipe's `serve`."""
    data = {"model": {"base": "tiny"}, "data": {"train": "none"}, "storage": str(folder / "runs"), "serve": serve}
    return Plan(
        name="test",
        recipe=Recipe.model_validate(data),
        base="tiny",
        base_name=BASE,
        base_hash="b" * 64,
        adapters={},
        sources={},
        registry=str(folder / "registry"),
        folder=str(folder / "server"),
    )


@pytest.fixture(scope="session")
def world(tiny_model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("adapters")
    reference(sharpened(tiny_model_folder), RANKS).model.save_pretrained(folder)
    adapters = {}
    for name in RANKS:
        path = str(Path(folder, name))
        adapters[name] = Content(AdapterState.read(path).content_hash(), path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    loop = Loop()

    async def made() -> Replica:
        return Replica(
            sharpened(tiny_model_folder),
            tokenizer,
            BASE,
            base_hash="b" * 64,
            settings=EngineSettings(max_num_seqs=16, max_num_batched_tokens=128, enable_prefix_caching=False),
        )

    replica = loop.run(made())
    yield World(loop, replica, adapters, tokenizer)
    replica.close()
    loop.stop()


@pytest.fixture(scope="session")
def url(world: World) -> Iterator[str]:
    with world.listening(world.app()) as address:
        yield address


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def server_of(world: World) -> Iterator[Callable[..., str]]:
    """``server_of(serve, **arguments of build) -> url`` until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda serve=None, **arguments: stack.enter_context(world.listening(world.app(serve, **arguments)))
