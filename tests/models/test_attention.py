"""Attention example by example against transformers' own masks over the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayft.models import attention

LENGTHS = (13, 1, 7, 10)


def model(architecture: str = "llama", **overrides: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **overrides,
    )
    return AutoModelForCausalLM.from_config(config).float().train()


def row(lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": torch.randint(97, position_ids.shape, generator=generator), "position_ids": position_ids}


def logits_and_gradients(causal: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = causal(**inputs, use_cache=False).logits
    gradients = torch.autograd.grad(logits.float().square().sum(), list(causal.parameters()))
    return logits, list(gradients)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("lengths", [LENGTHS, (31,)])
def test_equals_the_masked_row_in_float32(architecture: str, lengths: tuple[int, ...]) -> None:
    causal = model(architecture)
    assert attention.suits(causal.config)
    expected, expected_gradients = logits_and_gradients(causal, row(lengths))
    causal.set_attn_implementation(attention.NAME)
    logits, gradients = logits_and_gradients(causal, row(lengths))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_close_to_float32_as_stock_is(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, exact_gradients = logits_and_gradients(model(), row())

    def error(implementation: str) -> float:
        causal = model().bfloat16()
        causal.set_attn_implementation(implementation)
        logits, gradients = logits_and_gradients(causal, row())
        pairs = zip([logits, *gradients], [exact, *exact_gradients], strict=True)
        return max(((ours - true).norm() / true.norm()).item() for ours, true in pairs)

    stock = error("sdpa")
    assert error(attention.NAME) < 1.5 * stock
    monkeypatch.setattr(attention, "LONGEST_BY_MATMUL", 0)
    assert error(attention.NAME) < 1.5 * stock


def test_padded_batches_and_generation_are_stocks() -> None:
    causal = model().eval()
    inputs = {"input_ids": row()["input_ids"].view(1, -1)[:, :12].view(2, 6), "attention_mask": torch.ones(2, 6).long()}
    inputs["attention_mask"][0, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected, generated = causal(**inputs).logits, causal.generate(**inputs, **options)
    causal.set_attn_implementation(attention.NAME)
    assert torch.equal(causal(**inputs).logits, expected)
    assert torch.equal(causal.generate(**inputs, **options), generated)


def test_two_packed_rows_without_a_mask_are_not_mixed_up() -> None:
    causal = model()
    inputs = {name: values.view(1, -1)[:, :30].view(2, 15) for name, values in row((8, 7, 5, 10)).items()}
    expected = causal(**inputs, use_cache=False).logits
    causal.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(causal(**inputs, use_cache=False).logits, expected)


def test_is_installed_where_stock_sdpa_runs() -> None:
    suitable, eager = model(), model()
    eager.set_attn_implementation("eager")
    assert attention.install(suitable) and suitable.config._attn_implementation == attention.NAME
    assert not attention.install(eager) and eager.config._attn_implementation == "eager"
    assert not attention.install(model("mistral", sliding_window=4))


def test_sliding_windows_are_left_to_stock() -> None:
    assert not attention.suits(AutoConfig.for_model("mistral"))
    assert not attention.suits(AutoConfig.for_model("gemma3_text"))
    assert attention.suits(AutoConfig.for_model("llama"))
