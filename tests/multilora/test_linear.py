"""The shared linear layers against stock PEFT: one model, several adapters, any order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from rayft.multilora.linear import MultiLora, attach
from rayft.multilora.route import Route, dropout_seed
from rayft.multilora.schemes import SCHEMES

CONFIGS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    {"r": 16, "lora_alpha": 10, "target_modules": ["up_proj", "down_proj"], "use_rslora": True},
    {"r": 64, "lora_alpha": 32, "target_modules": ["k_proj", "gate_proj", "o_proj"]},
]
LENGTHS = [7, 12, 5, 9]
SLOTS = [2, 0, 5, 3]
"""Where the four adapters are put: slots need not be dense."""

Adapters = dict[int, dict[str, tuple[torch.Tensor, torch.Tensor, float]]]


def stock(folder: str, configs: list[dict[str, Any]]) -> Any:
    """Stock PEFT with one adapter per config, named a0, a1, ..., none of them zero."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(init_lora_weights=False, **configs[0]), adapter_name="a0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", LoraConfig(init_lora_weights=False, **config))
    model.base_model.set_adapter([f"a{number}" for number in range(len(configs))])
    return model


def taken(model: Any, number: int, *, trainable: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """The weights of one of its adapters, by module name."""
    name = f"a{number}"
    found = {}
    for path, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            pair = [part[name].weight.detach().clone() for part in (module.lora_A, module.lora_B)]
            A, B = [nn.Parameter(tensor) if trainable else tensor for tensor in pair]
            found[path] = A, B, module.scaling[name]
    return found


@pytest.fixture(scope="module")
def peft_model(tiny_model_folder: str) -> Any:
    return stock(tiny_model_folder, CONFIGS).eval()


@pytest.fixture(params=[*SCHEMES, "auto"])
def mlora(tiny_model_folder: str, peft_model: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Any, MultiLora]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    shared = attach(model, scheme=request.param)
    for number, slot in enumerate(SLOTS):
        shared.add(slot, taken(peft_model, number))
    yield model, shared


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_a_mixed_batch_equals_peft(mlora: tuple[Any, MultiLora], peft_model: Any) -> None:
    model, shared = mlora
    batch = ids(6, 11)
    names = ["a3", "a0", "__base__", "a1", "a0", "a2"]
    slots = [SLOTS[int(name[1:])] if name != "__base__" else -1 for name in names]
    with shared.route(Route(torch.tensor(slots, dtype=torch.int32).repeat_interleave(11))):
        ours = model(batch).logits
    torch.testing.assert_close(ours, peft_model(batch, adapter_names=names).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_without_an_adapter_are_the_base_bit_for_bit(mlora: tuple[Any, MultiLora]) -> None:
    model, shared = mlora
    batch = ids(4, 9)
    bare = model(batch).logits
    with shared.route(Route(torch.tensor([-1, SLOTS[1], -1, SLOTS[3]], dtype=torch.int32).repeat_interleave(9))):
        mixed = model(batch).logits
    assert torch.equal(mixed[[0, 2]], bare[[0, 2]])
    assert not torch.allclose(mixed[[1, 3]], bare[[1, 3]], atol=1e-3)
    with shared.route(Route(torch.full((36,), -1, dtype=torch.int32))):
        assert torch.equal(model(batch).logits, bare)


@torch.no_grad()
def test_rows_of_one_token_as_in_decoding(mlora: tuple[Any, MultiLora], peft_model: Any) -> None:
    """Ten requests with ten tokens so far, one new token each: the same logits as the whole text at once."""
    model, shared = mlora
    batch = ids(10, 11)
    which = [0, 1, 2, 3, 0, 2, 1, 3, 3, 0]
    slots = torch.tensor([SLOTS[number] for number in which], dtype=torch.int32)
    with shared.route(Route(slots.repeat_interleave(10))):
        cache = model(batch[:, :10], use_cache=True).past_key_values
    with shared.route(Route(slots)):
        ours = model(batch[:, 10:], past_key_values=cache).logits[:, 0]
    theirs = peft_model(batch, adapter_names=[f"a{number}" for number in which]).logits[:, -1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_strength_scales_each_row(mlora: tuple[Any, MultiLora], tiny_model_folder: str, peft_model: Any) -> None:
    model, shared = mlora
    batch = ids(3, 8)
    strength = torch.tensor([0.0, 1.0, 0.5])
    route = Route(torch.full((24,), SLOTS[1], dtype=torch.int32), strength.repeat_interleave(8))
    with shared.route(route):
        ours = model(batch).logits
    layers = [module for module in peft_model.modules() if "a1" in getattr(module, "lora_A", {})]
    for row, factor in enumerate(strength.tolist()):
        before = [layer.scaling["a1"] for layer in layers]
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling["a1"] = scaling * factor
        theirs = peft_model(batch[row : row + 1], adapter_names=["a1"]).logits
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling["a1"] = scaling
        torch.testing.assert_close(ours[row : row + 1], theirs, rtol=0, atol=1e-5)


def weighted_loss(logits: torch.Tensor) -> torch.Tensor:
    """Any smooth function that weighs every logit differently."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum() / 100


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gradients_equal_those_of_each_adapter_alone(
    tiny_model_folder: str, scheme: str, checkpointing: bool, shuffled: bool
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shared = attach(model, scheme=scheme)
    reference = stock(tiny_model_folder, CONFIGS).train()
    weights = {slot: taken(reference, number, trainable=True) for number, slot in enumerate(SLOTS)}
    for slot, adapter in weights.items():
        shared.add(slot, adapter)
    which = [0, 1, 2, 3, 1, 0] if shuffled else [0, 0, 1, 1, 2, 3]
    batch = ids(6, 9)
    route = Route(torch.tensor([SLOTS[number] for number in which], dtype=torch.int32).repeat_interleave(9))
    with shared.route(route):
        logits = model(batch, use_cache=False).logits
        torch.stack([weighted_loss(row) for row in logits]).sum().backward()

    for number, slot in enumerate(SLOTS):
        reference.base_model.set_adapter(f"a{number}")
        reference.zero_grad()
        rows = [row for row, owner in enumerate(which) if owner == number]
        torch.stack([weighted_loss(row) for row in reference(batch[rows]).logits]).sum().backward()
        for path, module in reference.base_model.model.named_modules():
            if f"a{number}" in getattr(module, "lora_A", {}):
                for letter, part in enumerate((module.lora_A, module.lora_B)):
                    expected = part[f"a{number}"].weight.grad
                    assert expected.abs().max() > 0
                    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
                    torch.testing.assert_close(weights[slot][path][letter].grad, expected, **close)


@pytest.mark.long
def test_torch_compile_gives_the_same(tiny_model_folder: str, peft_model: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder).train()
    shared = attach(model)
    weights = {slot: taken(peft_model, number, trainable=True) for number, slot in enumerate(SLOTS[:2])}
    for slot, adapter in weights.items():
        shared.add(slot, adapter)
    parameters = [tensor for adapter in weights.values() for A, B, _ in adapter.values() for tensor in (A, B)]
    route = Route(torch.tensor([SLOTS[0], SLOTS[1]], dtype=torch.int32).repeat_interleave(8))
    gradients = []
    for forward in (model, torch.compile(model)):
        with shared.route(route):
            loss = weighted_loss(forward(ids(2, 8), use_cache=False).logits)
            gradients.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_dropout_draws_for_each_adapter_alone(tiny_model_folder: str, scheme: str) -> None:
    """The oracle is PEFT with each `lora_dropout` seeded alike just before it draws."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder).train()
    shared = attach(model, scheme=scheme)
    rates = [0.0, 0.3, 0.5, 0.1]
    reference = stock(
        tiny_model_folder, [config | {"lora_dropout": rate} for config, rate in zip(CONFIGS, rates, strict=True)]
    ).train()
    for number, slot in enumerate(SLOTS):
        shared.add(slot, taken(reference, number), dropout=rates[number], seed=100 + number)
    batch = ids(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    owners = torch.tensor(SLOTS, dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))
    route = Route(owners, step={slot: 10 + slot for slot in SLOTS})
    with shared.route(route), torch.no_grad():
        ours = model(batch, position_ids=positions, use_cache=False).logits.split(LENGTHS, 1)
        model.eval()
        without = model(batch, position_ids=positions, use_cache=False).logits.split(LENGTHS, 1)

    for number, (slot, part) in enumerate(zip(SLOTS, batch.split(LENGTHS, 1), strict=True)):
        reference.base_model.set_adapter(f"a{number}")
        hooks = []
        for path, module in reference.base_model.model.named_modules():
            if f"a{number}" in getattr(module, "lora_dropout", {}):
                seed = dropout_seed(100 + number, 10 + slot, path)
                hooks.append(
                    module.lora_dropout[f"a{number}"].register_forward_pre_hook(
                        lambda *_, seed=seed: torch.manual_seed(seed) and None
                    )
                )
        with torch.no_grad():
            expected = reference(part, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(ours[number], expected, rtol=0, atol=1e-5)
        assert (rates[number] == 0) == torch.allclose(ours[number], without[number], atol=1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_an_overflow_stays_in_its_own_rows(tiny_model_folder: str, peft_model: Any, scheme: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    shared = attach(model, scheme=scheme)
    shared.add(0, taken(peft_model, 1))
    shared.add(1, {path: (A * torch.inf, B, scaling) for path, (A, B, scaling) in taken(peft_model, 1).items()})
    batch = ids(2, 8)
    with torch.no_grad():
        with shared.route(Route(torch.tensor([0, -1], dtype=torch.int32).repeat_interleave(8))):
            alone = model(batch).logits
        with shared.route(Route(torch.tensor([0, 1], dtype=torch.int32).repeat_interleave(8))):
            mixed = model(batch).logits
    assert not mixed[1].isfinite().all()
    torch.testing.assert_close(mixed[0], alone[0], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(tiny_model_folder: str, peft_model: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = attach(model, ["q_proj"])
    layer = "model.layers.0.self_attn.q_proj"
    good = torch.zeros(2, 64), torch.zeros(64, 2), 1.0
    shared.add(0, {layer: good})
    with pytest.raises(ValueError, match="slot 0 is in use"):
        shared.add(0, {layer: good})
    with pytest.raises(ValueError, match=r"no linear layer model\.layers\.0\.self_attn\.k_proj"):
        shared.add(1, {"model.layers.0.self_attn.k_proj": good})
    with pytest.raises(ValueError, match=r"takes A \[r, 64\] and B \[64, r\]"):
        shared.add(1, {layer: (torch.zeros(2, 65), torch.zeros(64, 2), 1.0)})
    assert shared.slots == {0}
    with pytest.raises(KeyError, match="no adapter in slot 4"), shared.route(Route(torch.tensor([4]))):
        pass
    with (
        shared.route(Route(torch.zeros(5, dtype=torch.int32))),
        pytest.raises(ValueError, match="got 6 rows, the route has 5"),
    ):
        model(ids(1, 6))
    shared.remove(0)
    shared.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_are_sorted_only_where_they_must_be() -> None:
    assert Route(torch.tensor([3, 3, -1, 0, 0])).order is None
    mixed = Route(torch.tensor([3, 0, 3, -1]))
    assert mixed.order is not None and mixed.inverse is not None
    assert mixed.slot[mixed.order].tolist() == [-1, 0, 3, 3]
    assert mixed.order[mixed.inverse].tolist() == [0, 1, 2, 3]
    assert [(s.slot, s.start, s.end) for s in mixed.segments] == [(-1, 0, 1), (0, 1, 2), (3, 2, 4)]
