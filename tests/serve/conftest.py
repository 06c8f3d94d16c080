"""One tiny model in a replica, and adapters on disk that stock PEFT knows too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from rayft.inference.settings import EngineSettings
from rayft.multilora.bank import AdapterState
from rayft.serve.job import Content
from rayft.serve.replica import Limits, Replica
from tests.inference.conftest import base, peft, tokenizer
from tests.inference.oracle import Reference

__all__ = ["base", "peft", "tokenizer"]


def written(state: AdapterState, folder: Path) -> Content:
    """An adapter as stock PEFT would have saved it."""
    folder.mkdir(parents=True, exist_ok=True)
    state.config.save_pretrained(str(folder))
    save_file(dict(state.tensors), folder / "adapter_model.safetensors")
    return Content(AdapterState.read(folder).content_hash(), str(folder))


@pytest.fixture(scope="session")
def contents(peft: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """The adapters of `peft` by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: written(state, folder / name) for name, state in peft.states.items()}


@pytest.fixture
def replica_with(base: Any, tokenizer: Any) -> Iterator[Callable[..., Replica]]:
    """``replica_with(limits=..., base_hash=..., **settings) -> Replica`` named "tiny". The one before it is closed."""
    made: list[Replica] = []

    def close() -> None:
        for replica in made:
            replica.close()
            replica.engine.mlora.detach()
        made.clear()

    def make(limits: Limits | None = None, base_hash: str | None = None, **settings: Any) -> Replica:
        close()
        made.append(
            Replica(
                base,
                tokenizer,
                "tiny",
                base_hash=base_hash,
                settings=EngineSettings(**settings),
                limits=limits or Limits(),
            )
        )
        return made[0]

    yield make
    close()
