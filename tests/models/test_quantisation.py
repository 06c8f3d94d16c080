"""bitsandbytes bases on CPU: they load, train, save, and an evaluation in between changes nothing."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rayft.errors import UsageError
from rayft.models import adapters, load
from rayft.models.save import load_trained

STOCK = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "fp4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def attached(folder, make_recipe, quantization, dtype="fp32", **adapter):
    recipe = make_recipe(
        folder, model={"quantization": quantization, "dtype": dtype}, adapter={"method": "lora", "rank": 4} | adapter
    )
    model = adapters.attach(load.load_base(recipe, folder), recipe, tokenizer=None, total_steps=10)
    return model, load.load_tokenizer(recipe, folder)


@pytest.mark.parametrize("quantization", STOCK)
def test_qlora_trains_and_stock_peft_reloads_it(
    quantization, tiny_model_folder, make_recipe, train_steps, logits_of, tmp_path
):
    model, tokenizer = attached(tiny_model_folder, make_recipe, quantization)
    linear = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    packed = {p for p in model.parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert sum(p.numel() for p in packed) == (linear if quantization == "int8" else linear // 2)
    assert adapters.parameter_counts(model) == model.get_nb_trainable_parameters()
    losses = train_steps(model)
    assert losses[-1] < losses[0]
    adapters.save(model, tmp_path, tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, dtype=torch.float32, quantization_config=STOCK[quantization]
    )
    load.keep_trainable_on_cpu(stock)
    stock = PeftModel.from_pretrained(stock, str(tmp_path))
    torch.testing.assert_close(logits_of(stock), logits_of(model), atol=1e-5, rtol=0)
    ours, _ = load_trained(tmp_path, dtype="fp32")
    torch.testing.assert_close(logits_of(ours), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", STOCK)
def test_evaluating_between_steps_changes_nothing(
    quantization, dtype, tiny_model_folder, make_recipe, train_steps, batch
):
    def losses(evaluate: bool) -> list[float]:
        model, _ = attached(tiny_model_folder, make_recipe, quantization, dtype)
        first = train_steps(model, 2, dtype=dtype)
        if evaluate:
            with torch.no_grad(), load.compute_context(dtype, "cpu"):
                model.eval()(**batch)
        return first + train_steps(model, 2, dtype=dtype)

    assert losses(evaluate=True) == losses(evaluate=False)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    "adapter", [{"use_dora": True}, {"method": "adalora"}, {"method": "ia3"}, {"method": "oft"}, {"method": "prompt"}]
)
def test_other_methods_train_on_a_quantised_base(adapter, quantization, tiny_model_folder, make_recipe, train_steps):
    if quantization == "int8" and "use_dora" in adapter:
        with pytest.raises(UsageError, match="R323"):
            attached(tiny_model_folder, make_recipe, quantization, "bf16", **adapter)
        return
    model, _ = attached(tiny_model_folder, make_recipe, quantization, "bf16", **adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_steps(model, lr=0.1, dtype="bf16")
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert len(moved) > 0.4 * len(before)


def test_loftq_starts_at_the_quantisation_error(tiny_model_folder, make_recipe, train_steps, logits_of, tmp_path):
    exact = logits_of(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    plain, _ = attached(tiny_model_folder, make_recipe, "nf4", rank=16)
    loftq, tokenizer = attached(tiny_model_folder, make_recipe, "nf4", rank=16, init_lora_weights="loftq")
    error = (logits_of(plain) - exact).norm()
    assert (logits_of(loftq) - exact).norm() < 0.8 * error
    train_steps(loftq)
    adapters.save(loftq, tmp_path, tokenizer)
    ours, _ = load_trained(tmp_path, dtype="fp32")
    torch.testing.assert_close(logits_of(ours), logits_of(loftq), atol=1e-5, rtol=0)
