"""Adapters of every kind in one batch, against stock PEFT with each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayft.multilora.bank import Bank
from rayft.multilora.linear import attach
from rayft.multilora.parts import parts_of
from rayft.multilora.route import Route
from tests.multilora.kinds import BIASED, CONFIGS, TIED, Stock, stock

LENGTH = 9


def loader(folder: str) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def kinds(tiny_model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return stock(loader(tiny_model_folder), CONFIGS, tmp_path_factory.mktemp("kinds"))


def ids(rows: int) -> torch.Tensor:
    return torch.randint(3, 300, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


def mixed(model: Any, kinds: Stock, names: list[str | None], strength: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of one batch with a row for each name."""
    mlora = attach(model)
    bank = Bank(mlora)
    slots = {name: bank.put(parts_of(state, mlora), torch.float32) for name, state in kinds.states.items()}
    slot = torch.tensor([slots.get(name, -1) for name in names], dtype=torch.int32).repeat_interleave(LENGTH)
    with torch.no_grad(), mlora.route(Route(slot, strength)):
        logits: torch.Tensor = model(ids(len(names)), use_cache=False).logits
    for slot_ in slots.values():
        bank.unload(slot_)
    mlora.detach()
    return logits


def check(model: Any, kinds: Stock) -> None:
    names = [*kinds.states, None, *reversed(kinds.states), None]
    batch = ids(len(names))
    bare = model(batch, use_cache=False).logits
    ours = mixed(model, kinds, names)
    for row, name in enumerate(names):
        theirs = kinds.logits(batch[row : row + 1], name)[0]
        close = 1e-5 * float(theirs.abs().max().clamp(min=1))
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=close, msg=lambda text, name=name: f"{name}: {text}")
        if name is None:
            assert torch.equal(ours[row], bare[row])
        else:
            assert not torch.allclose(ours[row], bare[row], atol=1e-2), name
    assert torch.equal(model(batch, use_cache=False).logits, bare)
    assert "forward" not in vars(model.lm_head) and "forward" not in vars(model.get_input_embeddings())


@torch.no_grad()
def test_every_kind_in_one_batch_equals_peft(tiny_model_folder: str, kinds: Stock) -> None:
    check(loader(tiny_model_folder)().eval(), kinds)


@torch.no_grad()
def test_a_base_whose_head_is_its_embedding(tiny_model_factory: Callable[..., str], tmp_path: Path) -> None:
    load = loader(tiny_model_factory(tie_word_embeddings=True))
    check(load().eval(), stock(load, TIED, tmp_path))


@torch.no_grad()
def test_a_base_with_biases(tiny_model_factory: Callable[..., str], tmp_path: Path) -> None:
    folder = tiny_model_factory(attention_bias=True, mlp_bias=True)

    def load() -> Any:
        model = loader(folder)()
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3, generator=generator)
        return model

    check(load().eval(), stock(load, BIASED, tmp_path))
