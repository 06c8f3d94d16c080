"""One tiny model with eight adapters, as stock PEFT has it and as the engine has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from rayft.inference.engine import Engine
from rayft.inference.settings import EngineSettings
from tests.inference.oracle import Reference, reference, sharpened

RANKS = {"anna": 1, "bert": 2, "carl": 4, "dora": 4, "emil": 8, "fred": 8, "gina": 16, "hugo": 32}


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def peft(tiny_model_folder: str) -> Reference:
    return reference(sharpened(tiny_model_folder), RANKS)


@pytest.fixture(scope="session")
def base(tiny_model_folder: str) -> Any:
    """Every engine of a session takes it over in its turn."""
    return sharpened(tiny_model_folder)


@pytest.fixture
def engine_with(base: Any, tokenizer: Any, peft: Reference) -> Any:
    """``engine_with(clock=..., **settings) -> Engine`` that knows the adapters of `peft` by their names. The one before
    it cannot be used any more."""
    made: list[Engine] = []

    def make(clock: Callable[[], float] | None = None, **settings: Any) -> Engine:
        arguments = {"clock": clock} if clock else {}
        if made:
            made.pop().mlora.detach()
        engine = Engine(base, tokenizer, EngineSettings(**settings), **arguments)
        made.append(engine)
        for name, state in peft.states.items():
            engine.register(state, name)
        return engine

    yield make
    if made:
        made.pop().mlora.detach()
