"""Every method trains, is saved, and comes back through stock PEFT or stock transformers with the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.errors import RunFailed, UsageError
from rayft.models import adapters, load
from rayft.models.save import load_trained

LINEAR = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
"""Weights of one block's linear layers: q and o, k and v, gate, up and down."""
LINEAR_SIDES = 128 * 2 + 96 * 2 + 192 * 3
"""in_features + out_features, summed over the same layers."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4},
    "rslora": {"method": "lora", "rank": 4, "use_rslora": True},
    "dora": {"method": "lora", "rank": 4, "use_dora": True},
    "attention": {"method": "lora", "rank": 4, "target_modules": "attention"},
    "mlp": {"method": "lora", "rank": 4, "target_modules": "mlp"},
    "regex": {"method": "lora", "rank": 4, "target_modules": r".*layers\.[01]\..*q_proj"},
    "modules_to_save": {"method": "lora", "rank": 4, "modules_to_save": ["lm_head"]},
    "gaussian": {"method": "lora", "rank": 4, "init_lora_weights": "gaussian"},
    "orthogonal": {"method": "lora", "rank": 4, "init_lora_weights": "orthogonal"},
    "pissa": {"method": "lora", "rank": 4, "init_lora_weights": "pissa"},
    "pissa_niter": {"method": "lora", "rank": 4, "init_lora_weights": "pissa_niter_4", "modules_to_save": ["norm"]},
    "pissa_rslora": {"method": "lora", "rank": 4, "init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"method": "lora", "rank": 4, "init_lora_weights": "olora"},
    "peft_args": {"method": "lora", "rank": 4, "peft_args": {"layers_to_transform": [1, 2]}},
    "adalora": {"method": "adalora", "rank": 4},
    "ia3": {"method": "ia3"},
    "oft": {"method": "oft", "rank": 8},
    "prefix": {"method": "prefix", "num_virtual_tokens": 5},
    "prompt": {"method": "prompt", "num_virtual_tokens": 5},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 5},
}
COUNTS = {
    "lora": 4 * 4 * LINEAR_SIDES,
    "dora": 4 * (4 * LINEAR_SIDES + 64 * 2 + 32 * 2 + 128 * 2 + 64),
    "attention": 4 * 4 * (128 * 2 + 96 * 2),
    "mlp": 4 * 4 * 192 * 3,
    "regex": 2 * 4 * 128,
    "modules_to_save": 4 * 4 * LINEAR_SIDES + 384 * 64,
    "adalora": 4 * 6 * (LINEAR_SIDES + 7),
    "ia3": 4 * (64 * 2 + 32 * 2 + 128 * 2 + 128),
    "prefix": 5 * 4 * 2 * 32,
    "prompt": 5 * 64,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_trains_and_stock_peft_reloads_it(
    name, tiny_model_folder, make_recipe, train_steps, logits_of, tmp_path
):
    recipe = make_recipe(tiny_model_folder, adapter=ADAPTERS[name])
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    base = load.load_base(recipe, tiny_model_folder)
    stock_logits = logits_of(base)
    model = adapters.attach(base, recipe, tokenizer, total_steps=10)
    if recipe.adapter.method not in ("oft", "prefix", "prompt", "p_tuning"):
        torch.testing.assert_close(logits_of(model), stock_logits, atol=1e-4, rtol=0)  # starts as the base
    losses = train_steps(model)
    assert losses[-1] < losses[0]

    assert adapters.parameter_counts(model) == model.get_nb_trainable_parameters()
    if name in COUNTS:
        assert adapters.parameter_counts(model)[0] == COUNTS[name]

    assert adapters.save(model, tmp_path, tokenizer) == "adapter"
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values()) > 0
    stock = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path))
    torch.testing.assert_close(logits_of(stock), logits_of(model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits_of(stock), stock_logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template

    ours, _ = load_trained(tmp_path, dtype="fp32")
    torch.testing.assert_close(logits_of(ours), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "oft", "prefix", "prompt", "p_tuning"])
def test_adapters_compute_in_bf16_from_fp32_masters(method, tiny_model_folder, make_recipe, train_steps):
    recipe = make_recipe(tiny_model_folder, model={"dtype": "bf16"}, adapter=ADAPTERS[method])
    model = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer=None, total_steps=10)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad and p.numel() > 1} == {torch.bfloat16}
    exact = make_recipe(tiny_model_folder, adapter=ADAPTERS[method])
    reference = adapters.attach(load.load_base(exact, tiny_model_folder), exact, tokenizer=None, total_steps=10)
    assert adapters.parameter_counts(model) == adapters.parameter_counts(reference)
    assert train_steps(model, dtype="bf16") == pytest.approx(train_steps(reference), abs=0.02)


def test_lora_matmuls_run_in_the_base_dtype(tiny_model_folder, make_recipe, batch):
    recipe = make_recipe(tiny_model_folder, model={"dtype": "bf16"}, adapter=ADAPTERS["lora"])
    model = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer=None)
    seen = set()
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda _, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    with load.compute_context("bf16", "cpu"):
        model(**batch)
    assert seen == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("trainable", "count"),
    [
        (None, None),
        ({"last_blocks": 2}, {False: 2 * (LINEAR + 128) + 64 + 384 * 64, True: 2 * (LINEAR + 128) + 64 + 384 * 64}),
        ({"patterns": [r"layers\.3\.mlp", "norm"]}, dict.fromkeys([True, False], 64 * 128 * 3 + 64 * 9)),
        ({"bias": True, "add_bias": True}, dict.fromkeys([True, False], 4 * (64 * 2 + 32 * 2 + 128 * 2 + 64))),
    ],
    ids=["full", "last_blocks", "patterns", "bitfit"],
)
def test_weights_train_and_stock_transformers_reloads_them(
    trainable, count, tied, tiny_model_factory, make_recipe, train_steps, logits_of, tmp_path
):
    folder = tiny_model_factory(tie_word_embeddings=tied)
    recipe = make_recipe(folder, train={"trainable": trainable})
    tokenizer = load.load_tokenizer(recipe, folder)
    base = load.load_base(recipe, folder)
    stock_logits = logits_of(base)
    model = adapters.attach(base, recipe, tokenizer)
    torch.testing.assert_close(logits_of(model), stock_logits, atol=0, rtol=0)
    trained, total = adapters.parameter_counts(model)
    assert trained == (total if count is None else count[tied])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train_steps(model)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(moved) > 5

    assert adapters.save(model, tmp_path, tokenizer) == "model"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(stock), logits_of(model), atol=1e-5, rtol=0)
    assert stock.config.use_cache
    assert type(stock) is type(base)


def test_frozen_weights_are_bf16_and_masters_survive_saving(tiny_model_folder, make_recipe, train_steps, tmp_path):
    recipe = make_recipe(tiny_model_folder, model={"dtype": "bf16"}, train={"trainable": {"last_blocks": 1}})
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    model = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    train_steps(model, dtype="bf16")
    adapters.save(model, tmp_path, tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    head = stock.lm_head.weight
    assert head.dtype == torch.float32
    assert torch.equal(head, model.lm_head.weight)
    assert not torch.equal(head, head.bfloat16().float())


def test_bitfit_finds_nothing_where_there_is_no_bias(tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, train={"trainable": {"bias": True}})
    with pytest.raises(UsageError, match=r"(?s)R326.*add_bias=true"):
        adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer=None)


def test_initialisation_depends_on_the_seed_alone(tiny_model_folder, make_recipe):
    def fingerprint(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        recipe = make_recipe(tiny_model_folder, adapter=ADAPTERS["lora"], seed=seed)
        model = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer=None)
        assert torch.initial_seed() == noise
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(fingerprint(1, noise=5), fingerprint(1, noise=6))
    assert not torch.equal(fingerprint(1, noise=5), fingerprint(2, noise=5))


def test_an_adapter_is_continued(tiny_model_folder, make_recipe, train_steps, logits_of, tmp_path):
    recipe = make_recipe(tiny_model_folder, adapter=ADAPTERS["lora"])
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    first = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer)
    train_steps(first)
    adapters.save(first, tmp_path, tokenizer)
    second = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer, init_from=str(tmp_path))
    assert torch.equal(logits_of(second), logits_of(first))
    assert train_steps(second) == train_steps(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "R324.*has rank 4, the recipe 8.*adapter.rank=4"),
        ({"method": "ia3"}, "R324.*LORA.*adapter.method=ia3"),
    ],
)
def test_an_adapter_of_another_kind_is_not_continued(change, message, tiny_model_folder, make_recipe, tmp_path):
    recipe = make_recipe(tiny_model_folder, adapter=ADAPTERS["lora"])
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    adapters.save(adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer), tmp_path, tokenizer)
    other = make_recipe(tiny_model_folder, adapter=ADAPTERS["lora"] | change)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        adapters.attach(load.load_base(other, tiny_model_folder), other, tokenizer, init_from=str(tmp_path))


def test_an_adapter_belongs_to_its_base(tiny_model_factory, make_recipe, tmp_path):
    folder, other = tiny_model_factory(), tiny_model_factory(rope_theta=5000.0)
    recipe = make_recipe(folder, adapter=ADAPTERS["lora"])
    tokenizer = load.load_tokenizer(recipe, folder)
    adapters.save(adapters.attach(load.load_base(recipe, folder), recipe, tokenizer), tmp_path, tokenizer)
    with pytest.raises(UsageError, match="R332"):
        adapters.attach(load.load_base(recipe, other), recipe, tokenizer, init_from=str(tmp_path))


def test_an_empty_adapter_is_not_saved_in_silence(tiny_model_folder, make_recipe, train_steps, tmp_path):
    recipe = make_recipe(tiny_model_folder, adapter=ADAPTERS["lora"])
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    model = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer)
    train_steps(model)
    shards = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(RunFailed, match="R330"):
        adapters.save(model, tmp_path, tokenizer, state_dict=shards)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, "R320.*query matches no module.*q_proj, k_proj, v_proj, o_proj"),
        ({"target_modules": "nothing.*"}, "R320.*nothing"),
        ({"target_modules": "(["}, "R320.*no regular expression"),
        ({"peft_args": {"layer_to_transform": [1]}}, "R108.*layer_to_transform.*did you mean layers_to_transform"),
        ({"init_lora_weights": "loftq"}, "R322.*model.quantization=nf4"),
        ({"init_lora_weights": "orthogonal", "rank": 3}, "R321.*even"),
    ],
)
def test_bad_adapter_settings_are_named(adapter, message, tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, adapter=adapter)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer=None)
