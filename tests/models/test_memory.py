"""The memory estimate against what models really hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rayft.models import adapters, load
from rayft.models.memory import estimate
from rayft.objectives import causal

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12}
"""Large enough for the parts that grow with the model to stand out."""


def stored(tensors) -> int:
    """Bytes of tensors, and of the scales that bitsandbytes keeps beside quantised ones."""
    total = 0
    for tensor in tensors:
        total += tensor.numel() * tensor.element_size()
        if (state := getattr(tensor, "quant_state", None)) is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            if state.nested:
                total += state.state2.absmax.numel() * 4
        if (scales := getattr(tensor, "SCB", None)) is not None:
            total += scales.numel() * 4
    return total


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank": 8}},
        {"adapter": {"rank": 8, "init_lora_weights": "pissa"}},
        {"adapter": {"rank": 8}, "model": {"quantization": "nf4"}},
        {"adapter": {"rank": 8}, "model": {"quantization": "fp4", "bnb_4bit_use_double_quant": False}},
        {"adapter": {"rank": 8}, "model": {"quantization": "int8"}},
        {"adapter": {"method": "prompt"}},
        {"train": {"trainable": {"last_blocks": 2}}},
        {"train": {"trainable": {"bias": True, "add_bias": True}}},
        {},
    ],
    ids=["lora", "pissa", "nf4", "fp4", "int8", "prompt", "last_blocks", "bitfit", "full"],
)
def test_weights_are_those_of_the_loaded_model(sections, dtype, tiny_model_factory, make_recipe):
    folder = tiny_model_factory(**WIDE)
    recipe = make_recipe(folder, **(sections | {"model": {"dtype": dtype} | sections.get("model", {})}))
    model = adapters.attach(load.load_base(recipe, folder), recipe, tokenizer=None)
    trained = [p for p in model.parameters() if p.requires_grad]
    casts = 2 * sum(p.numel() for p in trained if p.ndim > 1) if dtype == "bf16" else 0
    guess = estimate(recipe, folder, micro_batch_size=1)
    assert guess.trainable_parameters == sum(p.numel() for p in trained)
    assert guess.weights == pytest.approx(stored(model.parameters()) + casts, rel=0.005)
    assert guess.gradients == 4 * guess.trainable_parameters
    assert guess.optimizer == 8 * guess.trainable_parameters


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sections",
    [{"adapter": {"rank": 8}}, {}, {"train": {"trainable": {"last_blocks": 2}}}],
    ids=["lora", "full", "part"],
)
def test_activations_are_those_kept_for_backward(sections, dtype, tiny_model_factory, make_recipe):
    folder = tiny_model_factory(**WIDE)
    data = {"train": "unused.jsonl", "max_length": 256}
    recipe = make_recipe(folder, model={"dtype": dtype}, data=data, **sections)
    model = adapters.attach(load.load_base(recipe, folder), recipe, tokenizer=None)
    causal.install(model)
    model.train()
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 384, (1, 256))
    inputs = {"input_ids": ids, "position_ids": torch.arange(256)[None], "loss_weights": torch.ones(1, 256)}
    with load.compute_context(dtype, "cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    measured = sum(storage.nbytes() for storage in kept.values())
    if dtype == "bf16":  # counted with the weights
        measured -= 2 * sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1)
    guess = estimate(recipe, folder, tokens=256)
    assert guess.activations == pytest.approx(measured, rel=0.1)
    train = recipe.train.model_copy(update={"gradient_checkpointing": True})
    checkpointed = estimate(recipe.model_copy(update={"train": train}), folder, tokens=256)
    if "trainable" not in sections.get("train", {}):
        assert checkpointed.activations < 0.3 * guess.activations


def test_optimisers_and_sharding(tiny_model_folder, make_recipe):
    def guess(optim="adamw_torch", strategy="ddp", workers=4, dtype="bf16", device="cpu", **scale):
        recipe = make_recipe(
            tiny_model_folder,
            model={"dtype": dtype},
            train={"optim": optim},
            scale={"strategy": strategy, **scale},
        )
        return estimate(recipe, tiny_model_folder, workers=workers, device=device)

    n = guess().trainable_parameters
    assert guess("sgd").optimizer == 0
    assert guess("lion_32bit").optimizer == 4 * n
    assert guess("adamw_bnb_8bit").optimizer == pytest.approx(2 * n, rel=0.02)
    assert 0 < guess("adafactor").optimizer < 0.2 * n
    assert guess("paged_adamw_8bit", device="gpu").optimizer == 0
    assert guess("paged_adamw_8bit", device="gpu").offloaded > 0
    assert guess(workers=1).gradients == 4 * n
    # ZeRO's table: 2, 2 and 12 bytes per value for weights, gradients and state in mixed precision with Adam
    expected = {"zero1": (2, 2, 3), "zero2": (2, 0.5, 3), "zero3": (0.5, 0.5, 3)}
    for strategy, bytes_per_value in expected.items():
        found = guess(strategy=strategy)
        assert (found.weights, found.gradients, found.optimizer) == pytest.approx([n * b for b in bytes_per_value])
    offloaded = guess(strategy="zero3", offload=True)
    assert (offloaded.weights, offloaded.optimizer) == (0, 0)
    assert offloaded.offloaded == pytest.approx(3.5 * n)


def test_total_is_the_sum_of_the_parts_on_the_device(tiny_model_folder, make_recipe):
    guess = estimate(make_recipe(tiny_model_folder), tiny_model_folder, micro_batch_size=2)
    parts = {name: size for name, size in dataclasses.asdict(guess).items() if "parameters" not in name}
    assert guess.total == sum(parts.values()) - guess.offloaded
    assert guess.activations == 2 * estimate(make_recipe(tiny_model_folder), tiny_model_folder).activations
