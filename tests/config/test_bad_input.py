"""One test per kind of mistake: one message, with the key, what was given and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.config import load
from rayft.errors import UsageError

MINIMAL = {"model": {"base": "org/model"}, "data": {"train": "my.jsonl"}}


def refusal(*overrides: str, source: object = MINIMAL) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(source, overrides)  # type: ignore[arg-type]  # bad on purpose
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.learning_rat=1", "Did you mean train.learning_rate?"),
        ("trian.epochs=1", "Did you mean train?"),
        ("model.quantisation=nf4", "Did you mean model.quantization?"),
        ("learning_rate=1", "It stands elsewhere: train.learning_rate"),
        ("train.max_length=5", "It stands elsewhere: data.max_length"),
        ("train.trainable={last_block: 2}", "Did you mean train.trainable.last_blocks?"),
        ("data.train=[{path: x.jsonl, wieght: 2}]", "Did you mean data.train[].weight?"),
        ("seeed=3", "Did you mean seed?"),
        ("model.zzz=1", "Allowed in model: base, revision"),
    ],
)
def test_a_misspelt_key_names_the_nearest(override: str, meant: str) -> None:
    error = refusal(override)
    assert error.id == "R104"
    assert "unknown key" in error.message and meant in error.message


@pytest.mark.parametrize(
    ("theirs", "library", "ours"),
    [
        ("train.per_device_train_batch_size=8", "transformers", "train.micro_batch_size"),
        ("train.gradient_accumulation_steps=8", "transformers", "train.global_batch_size"),
        ("adapter.lora_alpha=8", "PEFT", "adapter.alpha"),
        ("adapter.r=8", "PEFT", "adapter.rank"),
        ("sequence_len=8", "Axolotl", "data.max_length"),
        ("cutoff_len=8", "LLaMA-Factory", "data.max_length"),
        ("max_seq_len=8", "torchtune", "data.max_length"),
        ("base_model=x", "Axolotl", "model.base"),
        ("max_seq_length=8", "TRL", "data.max_length"),
        ("per-device-train-batch-size=8", "transformers", "train.micro_batch_size"),
    ],
)
def test_a_rivals_key_is_translated(theirs: str, library: str, ours: str) -> None:
    error = refusal(theirs)
    assert error.id == "R104"
    assert library in error.message and f"here: {ours}" in error.message


@pytest.mark.parametrize(
    ("override", "given", "allowed"),
    [
        ("train.epochs=x", '"x" (text)', "number > 0"),
        ("train.epochs=0", "given 0", "number > 0"),
        ("train.epochs='2'", '"2" (text)', "number > 0"),
        ("adapter.rank=true", "given true", "whole number >= 1"),
        ("adapter.rank=1.5", "given 1.5", "whole number >= 1"),
        ("data.packing=no", '"no" (text)', "true or false"),
        ("model.dtype=float16", '"float16" (text)', "auto, bf16, fp16, fp32"),
        ("scale.workers=many", '"many" (text)', "whole number, auto or [min, max]"),
        ("scale.workers=-1", "given -1", "0 or more"),
        ("scale.workers=[4, 2]", "given [4, 2]", "min <= max"),
        ("scale.workers=[1, 2, 3]", "given [1, 2, 3]", "[min, max]"),
        ("data.validation=1.5", "given 1.5", "between 0 and 1"),
        ("data.train.0.limit=a", '"a" (text)', "whole number >= 1 or null"),
        ("train.report_to=[foo]", '"foo" (text)', "tensorboard, mlflow, wandb"),
        ("train.micro_batch_size=0", "given 0", "1 or more"),
        ("train.optim=adamw", '"adamw"', "adamw_torch"),
        ("train.optim=lomo", '"lomo"', "global batch"),
        ("train.lr_scheduler_type=cosin", '"cosin"', "did you mean cosine"),
        ("name=Foo Bar", '"Foo Bar" (text)', "matches"),
        ("adapter=lora", '"lora" (text)', "section (method, rank"),
        ("model=3", "given 3", "section (base"),
        ("model.base=null", "given null", "allowed: text"),
        ("adapter.init_lora_weights=eva", '"eva"', "pissa_niter_N"),
        ("train.trainable={}", "given {}", "last_blocks, patterns or bias"),
        ("train.trainable={patterns: [a], add_bias: true}", "add_bias", "stay at zero"),
        ("train.trainable=[{last_blocks: 1, start: 5}]", "start", "phases start at 0"),
    ],
)
def test_a_wrong_value_says_what_was_given_and_what_is_allowed(override: str, given: str, allowed: str) -> None:
    error = refusal(override)
    assert error.id == "R105"
    key = override.partition("=")[0]
    assert error.message.startswith(key)
    assert given in error.message and allowed in error.message


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"data": {"train": "x.jsonl"}}, "model.base"),
        ({"model": {}, "data": {"train": "x.jsonl"}}, "model.base"),
        ({"model": {"base": "m"}}, "data.train"),
        ({"model": {"base": "m"}, "data": {"packing": True}}, "data.train"),
        ({"model": {"base": "m"}, "data": {"train": [{"format": "text"}]}}, "data.train.0.path"),
    ],
)
def test_a_missing_key_is_named(source: dict[str, object], key: str) -> None:
    error = refusal(source=source)
    assert error.id == "R106"
    assert error.message.startswith(f"{key} is required")


def test_all_problems_are_listed_together() -> None:
    error = refusal("lora_alpha=8", "train.epochs=x", "model.dtyp=bf16", source={"data": {"train": "x.jsonl"}})
    assert error.id == "R100"
    lines = error.message.splitlines()
    assert "4 problems" in lines[0]
    for expected in ("R104: lora_alpha", "R105: train.epochs", "R104: model.dtyp", "R106: model.base is required"):
        assert sum(expected in line for line in lines[1:]) == 1, expected


def test_all_impossible_combinations_are_listed_together() -> None:
    error = refusal("model.quantization=int8", "scale.strategy=zero3", "train.trainer_args={output_dir: x}")
    assert error.id == "R100"
    assert "int8 with" in error.message.replace("model.quantization=int8", "int8")
    assert "R107" in error.message and "R108" in error.message


def test_a_file_s_problem_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {base: m}\ndata:\n  train: x.jsonl\ntrain:\n  epochs: two\n  learning_rat: 1e-4\n")
    error = refusal(source=file)
    assert "train.epochs (mine.yaml line 5)" in error.message
    assert "train.learning_rat (mine.yaml line 6)" in error.message
    assert "(override)" in refusal("train.epochs=three", source=file).message


def test_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    error = refusal(source=tmp_path / "quikstart.yaml")
    assert error.id == "R101"
    assert "no such file" in error.message
    assert error.hint is not None and "quickstart.yaml" in error.hint


def test_a_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF\xff\xfe\x00")
    error = refusal(source=file)
    assert (error.id, "not UTF-8" in error.message) == ("R101", True)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("model: {base: m}\ndata: {train: [x\n", "line 3", "not valid YAML"),
        ("model:\n  base: m\n base: n\n", "line 3", "not valid YAML"),
        ("name: a\nmodel: {base: m}\nname: b\n", "line 3", "duplicate key"),
        ("- a\n- b\n", "", "a list; a recipe is a mapping"),
        ("just text", "", "a recipe is a mapping"),
        ("model: !!python/object:os.system {base: m}\nname: !secret x\n", "", "tag"),
    ],
)
def test_malformed_yaml(tmp_path: Path, text: str, line: str, problem: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    error = refusal(source=file)
    assert error.id == "R102"
    assert line in error.message and problem in error.message


@pytest.mark.parametrize(
    "override", ["train.epochs", "=3", ".a=3", "train..epochs=1", "model.base.x.y=1", "data.train.7.limit=1", "name=[a"]
)
def test_a_bad_override(override: str) -> None:
    error = refusal(override)
    assert error.id == "R103"
    assert override.partition("=")[0] in error.message


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.trainer_args={per_device_train_batch_size: 4}", "train.micro_batch_size"),
        ("train.trainer_args={learning_rate: 1}", "write train.learning_rate"),
        ("train.trainer_args={dataloader_drop_last: true}", "nothing is dropped"),
        ("train.trainer_args={seed: 3}", "seed at the top"),
        ("train.trainer_args={average_tokens_across_devices: true}", "sum of weights"),
        ("adapter.peft_args={r: 3}", "write adapter.rank"),
        ("adapter.peft_args={use_dora: true}", "write adapter.use_dora"),
    ],
)
def test_arguments_that_would_break_a_promise(override: str, answer: str) -> None:
    error = refusal(override)
    assert error.id == "R108"
    assert answer in error.message
