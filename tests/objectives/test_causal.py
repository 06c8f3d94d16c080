"""The chunked loss against Hugging Face's own `model(labels=...)`: same value, same gradients, fewer logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from rayft.objectives.causal import install

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def causal_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES | overrides))
    return model.float().train()


def lora(model: Any, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options)
    return get_peft_model(model, config)


def batch(lengths: tuple[int, ...] = (13, 7, 10), seed: int = 0) -> dict[str, torch.Tensor]:
    """A right-padded batch in which about half of the tokens are supervised, never the first of an example."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    attention_mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    loss_weights = (torch.rand(shape, generator=generator) < 0.5).float() * attention_mask
    loss_weights[:, 0] = 0
    input_ids = torch.randint(VOCABULARY, shape, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_weights": loss_weights}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def stock_loss(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hugging Face's mean over `labels != -100`, as a sum."""
    labels = rows["input_ids"].masked_fill(rows["loss_weights"] == 0, -100)
    mean = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
    return mean * (labels != -100).sum()


def assert_same(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == stock.keys() and ours
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


VARIANTS: dict[str, Callable[[], Any]] = {
    "full": causal_model,
    "full, tied": lambda: causal_model(tie_word_embeddings=True),
    "full, gpt2": lambda: causal_model("gpt2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "full, gemma2 (soft-capped)": lambda: causal_model("gemma2", head_dim=8, final_logit_softcapping=0.5),
    "full, cohere (scaled)": lambda: causal_model("cohere", logit_scale=0.3),
    "full, granite (divided)": lambda: causal_model("granite", logits_scaling=3.0),
    "full, mixture of experts": lambda: causal_model("mixtral", num_local_experts=2, num_experts_per_tok=1),
    "lora": lambda: lora(causal_model()),
    "lora, tied": lambda: lora(causal_model(tie_word_embeddings=True)),
    "lora on the head": lambda: lora(causal_model(), target_modules=["q_proj", "lm_head"]),
    "lora, head saved": lambda: lora(causal_model(), modules_to_save=["lm_head"]),
    "lora, new tokens, tied": lambda: lora(causal_model(tie_word_embeddings=True), trainable_token_indices=[3, 90]),
    "prompt tuning": lambda: get_peft_model(
        causal_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "p-tuning": lambda: get_peft_model(
        causal_model(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)
    ),
    "prefix tuning": lambda: get_peft_model(
        causal_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_hugging_faces(variant: str) -> None:
    model, rows = VARIANTS[variant](), batch()
    expected = stock_loss(model, rows)
    expected_gradients = gradients(model, expected)
    install(model, chunk_rows=4)
    output = model(**rows)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, output.loss), expected_gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, rows = lora(causal_model()), batch()
    install(model)
    expected = gradients(model, model(**rows).loss)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(gradients(model, model(**rows).loss), expected)


def test_clm_is_hugging_faces_loss_on_the_same_batch() -> None:
    model, rows = causal_model(), batch((9, 9))
    expected = model(input_ids=rows["input_ids"], labels=rows["input_ids"]).loss
    install(model)
    rows["loss_weights"] = torch.ones_like(rows["loss_weights"])
    rows["loss_weights"][:, 0] = 0
    ours = model(**rows).loss / rows["loss_weights"].sum()
    torch.testing.assert_close(ours, expected, rtol=2e-7, atol=0)  # one unit in the last place


def test_fractional_weights_equal_a_plain_loop() -> None:
    model, rows = causal_model(), batch()
    rows["loss_weights"] = torch.where(rows["loss_weights"] == 0, 0.1, 1.0) * rows["attention_mask"]
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    expected = torch.zeros(())
    for row, length in enumerate((13, 7, 10)):
        for t in range(1, length):
            log_probabilities = torch.log_softmax(logits[row, t - 1], dim=-1)
            expected = expected - rows["loss_weights"][row, t] * log_probabilities[rows["input_ids"][row, t]]
    expected_gradients = gradients(model, expected)
    install(model, chunk_rows=5)
    loss = model(**rows).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, loss), expected_gradients)


def test_padding_free_equals_padded() -> None:
    model, rows, lengths = lora(causal_model()), batch(), (13, 7, 10)
    install(model)
    padded = model(**rows).loss
    padded_gradients = gradients(model, padded)
    real = rows["attention_mask"].bool()
    laid_out = {
        "input_ids": rows["input_ids"][real][None],
        "loss_weights": rows["loss_weights"][real][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    loss = model(**laid_out).loss
    torch.testing.assert_close(loss, padded, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, loss), padded_gradients)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_chunk_size_changes_nothing(chunk_rows: int) -> None:
    rows, reference, model = batch(), causal_model(), causal_model()
    install(reference)
    install(model, chunk_rows=chunk_rows)
    ours, expected = model(**rows).loss, reference(**rows).loss
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, ours), gradients(reference, expected))


@pytest.mark.parametrize("variant", ["full", "full, tied", "lora", "lora on the head", "prompt tuning"])
def test_no_weights_give_zero_loss_and_zero_gradients_everywhere(variant: str) -> None:
    model, rows = VARIANTS[variant](), batch()
    install(model)
    rows["loss_weights"].zero_()
    loss = model(**rows).loss
    assert loss.item() == 0
    zero = gradients(model, loss)
    assert zero.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(not gradient.any() for gradient in zero.values())


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ["full, tied", "lora", "lora on the head"])
def test_ddp_sees_every_parameter_once_also_without_weights(variant: str, one_process_group: None) -> None:
    model, rows, none = VARIANTS[variant](), batch(), batch()
    install(model, chunk_rows=4)
    none["loss_weights"].zero_()
    expected = gradients(model, model(**rows).loss)
    parallel = nn.parallel.DistributedDataParallel(model)
    for inputs, weight in ((none, 0), (rows, 1), (none, 0), (rows, 1)):
        gradients_now = gradients(model, parallel(**inputs).loss)
        assert_same(gradients_now, {name: weight * gradient for name, gradient in expected.items()})


@pytest.mark.long
def test_torch_compile_leaves_the_loss_alone() -> None:
    model = lora(causal_model())
    install(model, chunk_rows=4)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for seed in range(2):
        rows = batch(seed=seed)
        assert_same(gradients(model, compiled(**rows).loss), gradients(model, model(**rows).loss))


def test_the_gradient_scales_with_what_the_caller_does_to_the_loss() -> None:
    model, rows = causal_model(), batch()
    install(model)
    whole = gradients(model, model(**rows).loss)
    assert_same(gradients(model, model(**rows).loss / 8), {name: gradient / 8 for name, gradient in whole.items()})


def test_only_supervised_rows_reach_the_head_one_chunk_at_a_time() -> None:
    model, rows = causal_model(), batch()
    seen: list[int] = []
    stock_forward = model.lm_head.forward

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = stock_forward(hidden)
        seen.append(logits.numel() // VOCABULARY)
        return logits

    model.lm_head.forward = spy
    install(model, chunk_rows=4)
    model(**rows).loss.backward()
    assert max(seen) <= 4 and sum(seen) == int((rows["loss_weights"] != 0).sum())
    assert model.lm_head.forward is spy


def test_without_loss_weights_the_model_is_what_it_was() -> None:
    model, rows = causal_model().eval(), batch()
    untouched = copy.deepcopy(model)
    install(model)
    inputs = {"input_ids": rows["input_ids"][:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), untouched.generate(**inputs, **options))


def test_evaluation_computes_no_gradients() -> None:
    model, rows = causal_model().eval(), batch()
    install(model, chunk_rows=4)
    with torch.no_grad():
        loss = model(**rows).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, model(**rows).loss)


def test_bfloat16_autocast_computes_the_cross_entropy_in_float32() -> None:
    model, rows = lora(causal_model()), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock_loss(model, rows)
    expected_gradients = gradients(model, expected)
    install(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**rows).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=2e-2, atol=2e-2)


def test_own_loss_function_gets_logits_targets_and_weights() -> None:
    def label_smoothed(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
        return (losses * weights).sum()

    model, rows = causal_model(), batch()
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1].flatten(0, 1)
    expected = label_smoothed(logits, rows["input_ids"][:, 1:].flatten(), rows["loss_weights"][:, 1:].flatten())
    expected_gradients = gradients(model, expected)
    install(model, loss_function=label_smoothed, chunk_rows=4)
    loss = model(**rows).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, loss), expected_gradients)
