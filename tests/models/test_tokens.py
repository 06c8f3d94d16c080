"""New tokens: mean rows, trained alone under an adapter, there again after loading."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayft.errors import UsageError
from rayft.models import adapters, load
from rayft.models.save import load_trained

NEW = ["<tool>", "</tool>"]


@pytest.fixture
def new_batch(batch):
    """The batch with the new tokens' ids (384 and 385) in it."""
    ids = batch["input_ids"].clone()
    ids[:, 3], ids[:, 7] = 384, 385
    return batch | {"input_ids": ids, "labels": ids}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"]).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_only_new_rows_are_trained_and_stock_peft_reloads_them(
    method, tied, tiny_model_factory, make_recipe, train_steps, batch, new_batch, tmp_path
):
    folder = tiny_model_factory(tie_word_embeddings=tied)
    recipe = make_recipe(folder, model={"add_tokens": NEW}, adapter={"method": method, "rank": 4})
    tokenizer = load.load_tokenizer(recipe, folder)
    assert tokenizer.convert_tokens_to_ids(NEW) == [384, 385]
    base = load.load_base(recipe, folder)
    old = base.get_input_embeddings().weight.detach().clone()
    model = adapters.attach(base, recipe, tokenizer, total_steps=10)
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[384:], old.mean(0).expand(2, -1))

    plain = make_recipe(folder, adapter={"method": method, "rank": 4})
    without = adapters.attach(load.load_base(plain, folder), plain, tokenizer, total_steps=10)
    extra = adapters.parameter_counts(model)[0] - adapters.parameter_counts(without)[0]
    assert extra == (1 if tied else 2) * 2 * 64

    batch.update(new_batch)
    train_steps(model)
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[:384], old)
    assert not torch.allclose(rows[384], rows[385])

    adapters.save(model, tmp_path, tokenizer)
    whole = 384 * 64
    assert all(tensor.numel() < whole for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock.resize_token_embeddings(len(tokenizer))
    stock = PeftModel.from_pretrained(stock, str(tmp_path))
    torch.testing.assert_close(logits(stock, new_batch), logits(model, new_batch), atol=1e-5, rtol=0)
    ours, again = load_trained(tmp_path, dtype="fp32")
    assert again.convert_tokens_to_ids(NEW) == [384, 385]
    torch.testing.assert_close(logits(ours, new_batch), logits(model, new_batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trainable", [None, {"last_blocks": 1}])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_trained_with_the_weights(
    tied, trainable, tiny_model_factory, make_recipe, train_steps, batch, new_batch, tmp_path
):
    folder = tiny_model_factory(tie_word_embeddings=tied)
    recipe = make_recipe(folder, model={"add_tokens": NEW}, train={"trainable": trainable})
    tokenizer = load.load_tokenizer(recipe, folder)
    model = adapters.attach(load.load_base(recipe, folder), recipe, tokenizer)
    start = model.get_input_embeddings().weight.detach().clone()
    batch.update(new_batch)
    train_steps(model)
    assert not torch.equal(model.get_input_embeddings().weight[384:], start[384:])
    adapters.save(model, tmp_path, tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config.vocab_size == 386
    torch.testing.assert_close(logits(stock, new_batch), logits(model, new_batch), atol=1e-5, rtol=0)


def test_spare_rows_are_used_before_the_matrix_grows(tiny_model_factory, make_recipe):
    folder = tiny_model_factory(vocab_size=400)
    recipe = make_recipe(folder, model={"add_tokens": NEW}, adapter={})
    tokenizer = load.load_tokenizer(recipe, folder)
    model = adapters.attach(load.load_base(recipe, folder), recipe, tokenizer)
    rows = model.get_input_embeddings().weight
    assert len(rows) == 400
    torch.testing.assert_close(rows[384], rows[:384].mean(0))


def test_a_known_token_is_refused(tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, model={"add_tokens": ["<|im_end|>"]})
    with pytest.raises(UsageError, match=r"R311.*<\|im_end\|>"):
        load.load_tokenizer(recipe, tiny_model_folder)


def test_methods_without_token_rows_refuse_new_tokens(tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, model={"add_tokens": NEW}, adapter={"method": "ia3"})
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    with pytest.raises(UsageError, match=r"R325.*ia3"):
        adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer)
