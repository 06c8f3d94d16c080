"""Number formats, attention, tokenizer and the messages about what cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayft.errors import UsageError
from rayft.models import adapters, load
from rayft.models.identity import base_hash, content_hash
from rayft.models.save import load_trained


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16"}, "bf16"),
        ({"amx_bf16"}, "bf16"),
        ({"bf16"}, "bf16"),
        ({"avx2", "avx512f"}, "fp32"),
        (set(), "fp32"),
    ],
)
def test_auto_is_bf16_where_the_cpu_computes_in_it(flags, expected, make_recipe, monkeypatch):
    monkeypatch.setattr(load, "_cpu_flags", lambda: frozenset(flags))
    assert load.dtype_of(make_recipe("base", model={"dtype": "auto"}), "cpu") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_gpu_computes_in_it(native, expected, make_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert load.dtype_of(make_recipe("base", model={"dtype": "auto"}), "gpu") == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_given_dtype_is_taken(dtype, tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, model={"dtype": dtype}, adapter={})
    assert load.dtype_of(recipe, "cpu") == dtype
    assert load.load_base(recipe, tiny_model_folder).dtype == load.torch_dtype(dtype)


def test_trained_weights_are_loaded_in_full_precision(tiny_model_folder, make_recipe):
    model = load.load_base(make_recipe(tiny_model_folder, model={"dtype": "bf16"}), tiny_model_folder)
    assert torch.equal(model.lm_head.weight, load_file(f"{tiny_model_folder}/model.safetensors")["lm_head.weight"])
    assert not model.config.use_cache


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_is_chosen(kernel, tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, model={"attn_implementation": kernel}, adapter={})
    assert load.load_base(recipe, tiny_model_folder).config._attn_implementation == kernel


def test_flash_attention_needs_a_gpu(tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, model={"attn_implementation": "flash_attention_2"}, adapter={})
    with pytest.raises(UsageError, match="R312"):
        load.load_base(recipe, tiny_model_folder)


def test_liger_needs_its_package_or_a_gpu(tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, train={"use_liger_kernel": True})
    with pytest.raises(UsageError, match="R314"):
        load.load_base(recipe, tiny_model_folder)


def test_chat_template_from_text_and_file(tiny_model_folder, make_recipe, tmp_path):
    text = "{% for m in messages %}[{{ m.role }}] {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text)
    for value in (text, str(tmp_path / "mine.jinja")):
        recipe = make_recipe(tiny_model_folder, data={"train": "x.jsonl", "chat_template": value})
        tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [("missing.jinja", "R310.*missing.jinja is neither"), ("{% for m in %}", "R310.*line 1"), ("{{ x", "R310")],
)
def test_bad_chat_template(template, message, tiny_model_folder, make_recipe):
    recipe = make_recipe(tiny_model_folder, data={"train": "x.jsonl", "chat_template": template})
    with pytest.raises(UsageError, match=message):
        load.load_tokenizer(recipe, tiny_model_folder)


def test_a_tokenizer_without_padding_gets_one(tiny_model_folder, make_recipe, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load.load_tokenizer(make_recipe(str(folder)), str(folder)).pad_token == "<|im_end|>"


def test_damaged_weights_are_named(tiny_model_folder, make_recipe, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UsageError, match=f"R316.*{folder}"):
        load.load_base(make_recipe(str(folder)), str(folder))


def test_missing_weights_are_not_made_up(tiny_model_folder, make_recipe, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"R316.*layers\.1\.mlp\.up_proj"):
        load.load_base(make_recipe(str(folder)), str(folder))


def test_remote_code_is_off(tiny_model_folder, make_recipe, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(UsageError, match=r"(?s)R315.*trust_remote_code"):
        load.load_base(make_recipe(str(folder)), str(folder))


def test_trained_results_are_found_by_their_content(tiny_model_folder, make_recipe, tmp_path):
    recipe = make_recipe(tiny_model_folder, adapter={"rank": 4})
    tokenizer = load.load_tokenizer(recipe, tiny_model_folder)
    model = adapters.attach(load.load_base(recipe, tiny_model_folder), recipe, tokenizer)
    adapters.save(model, tmp_path / "a", tokenizer)
    adapters.save(model, tmp_path / "b", tokenizer)
    moved = shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b") == content_hash(moved)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1e-3)
    adapters.save(model, tmp_path / "b", tokenizer)
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_a_changed_base_is_noticed(tiny_model_folder, make_recipe, tmp_path):
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    recipe = make_recipe(str(base), adapter={"rank": 4})
    tokenizer = load.load_tokenizer(recipe, str(base))
    adapters.save(adapters.attach(load.load_base(recipe, str(base)), recipe, tokenizer), tmp_path / "out", tokenizer)
    load_trained(tmp_path / "out")
    before = base_hash(base)
    assert before == content_hash(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert base_hash(base) != before
    with pytest.raises(UsageError, match="R332"):
        load_trained(tmp_path / "out")


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(UsageError, match="R331"):
        load_trained(tmp_path)
