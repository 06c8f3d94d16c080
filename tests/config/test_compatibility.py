"""The one table: each known row refuses with its reason, and nothing else does."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from rayft.config import load
from rayft.config.adapter import Adapter, AdapterMethod
from rayft.config.choices import IN_BACKWARD, OPTIMISERS, SCHEDULES
from rayft.config.compatibility import NOT_SET, SET, TABLE, UNUSED, check, facts_of, unverified
from rayft.config.keys import allowed_at, keys
from rayft.config.recipe import Recipe
from rayft.config.trainer_args import PEFT_REFUSED, REFUSED, check_names
from rayft.errors import UsageError

MINIMAL = ["model.base=org/model", "data.train=my.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.quantization=nf4"], "only an adapter"),
        (["model.quantization=fp4"], "only an adapter"),
        (["model.quantization=int8"], "only an adapter"),
        (["adapter={}", "train.trainable={last_blocks: 1}"], "frozen under an adapter"),
        (["adapter={}", "train.l2_sp=0.1"], "frozen"),
        (["train.l2_sp=0.1", "scale.strategy=zero3"], "shard"),
        *(
            (["train.trainable=[{last_blocks: 1}]", f"scale.strategy={strategy}"], "changes at each phase")
            for strategy in ("zero1", "zero2", "zero3", "fsdp")
        ),
        *(([f"adapter.method={m}", "data.packing=true"], "virtual tokens") for m in ("prefix", "prompt", "p_tuning")),
        *(
            ([f"adapter.method={m}", "data.padding_free=true"], "laid end to end")
            for m in ("prefix", "prompt", "p_tuning")
        ),
        (["adapter.method=prefix", "train.gradient_checkpointing=true"], "key-value cache"),
        (["adapter={}", "model.quantization=int8", "scale.strategy=zero3"], "1451"),
        (["adapter={}", "model.quantization=nf4", "scale.strategy=zero3"], "7900"),
        (["adapter={}", "model.quantization=nf4", "scale.strategy=fsdp"], "one number format"),
        (["scale.strategy=fsdp", "scale.device=cpu"], "no FSDP on CPU"),
        (["scale.offload=true"], "only ZeRO"),
        *(([f"scale.strategy={s}", "adapter.method=adalora"], "importance") for s in ("zero1", "zero2", "zero3")),
        (["adapter.method=adalora", "adapter.use_dora=true"], "no such setting"),
        (["adapter.init_lora_weights=loftq"], "this base has none"),
        (["adapter.init_lora_weights=loftq", "model.quantization=int8"], "8-bit"),
        (["adapter.method=p_tuning", "adapter.init_from=run:x"], "not all that training needs"),
        (["adapter.use_dora=true", "model.quantization=int8", "scale.device=cpu"], "loses the scales"),
        (["adapter.method=ia3", "model.add_tokens=[a]"], "beside LoRA only"),
        (["train.load_best_model_at_end=true"], "lowest validation loss"),
        (["adapter.init_lora_weights=pissa_niter_4", "model.quantization=nf4"], "main directions"),
        (["adapter.init_lora_weights=olora", "model.quantization=int8"], "main directions"),
        (["adapter.init_lora_weights=pissa", "adapter.init_from=run:x"], "thrown away"),
        (["adapter.init_lora_weights=orthogonal", "adapter.rank=3"], "two halves"),
        (["train.objective=clm", "data.train_on=assistant"], "every token"),
        (["train.early_stopping_patience=2"], "validation loss"),
        (["train.eval_steps=5"], "nothing to evaluate"),
        (["train.dataloader_prefetch_factor=2"], "loader workers"),
        (["model.attn_implementation=flash_attention_2", "model.dtype=fp32"], "bf16 or fp16"),
        (["model.attn_implementation=flash_attention_2", "scale.device=cpu"], "GPU"),
        (["model.dtype=fp16", "scale.device=cpu"], "GPU"),
        (["train.use_liger_kernel=true", "scale.device=cpu"], "Triton"),
        (["adapter.method=ia3", "adapter.rank=8"], "no such setting"),
        (["adapter.num_virtual_tokens=8"], "no such setting"),
        (["adapter.method=oft", "adapter.use_dora=true"], "no such setting"),
    ],
)
def test_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load(None, MINIMAL + overrides)
    assert caught.value.exit_code == 2
    assert caught.value.id == "R107"
    assert "Instead: " in caught.value.message
    for key in (override.partition("=")[0] for override in overrides if override != "adapter={}"):
        assert key in caught.value.message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter={}", "model.quantization=nf4", "scale.strategy=zero2"],
        ["adapter={}", "model.quantization=int8"],
        ["adapter.use_dora=true", "model.quantization=nf4"],
        ["adapter.method=prefix"],
        ["adapter.method=adalora", "model.quantization=nf4"],
        ["adapter.init_lora_weights=pissa"],
        ["adapter.init_lora_weights=loftq", "model.quantization=nf4"],
        ["adapter.method=adalora", "model.add_tokens=[a]"],
        ["train.trainable=[{last_blocks: 1}, {last_blocks: 4, start: 0.5}]"],
        ["train.trainable={bias: true, add_bias: true}", "scale.strategy=zero3", "scale.offload=true"],
        ["train.l2_sp=0.01", "scale.strategy=zero2"],
        ["train.objective=clm", "data.packing=true"],
        ["data.packing=true", "data.padding_free=false"],
        ["train.early_stopping_patience=2", "data.validation=0.1"],
        ["model.dtype=fp16"],
    ],
)
def test_allowed(overrides: list[str]) -> None:
    check(load(None, MINIMAL + overrides).recipe)


def test_every_row_looks_at_keys_and_values_that_exist() -> None:
    recipe = load(None, [*MINIMAL, "adapter={}"]).recipe
    facts = facts_of(recipe)
    for row in TABLE:
        for key, condition in row.when.items():
            assert key in facts, key
            for value in condition if isinstance(condition, tuple) else (condition,):
                if isinstance(value, str) and value not in (SET, NOT_SET, "odd", "not default", "phases"):
                    words = allowed_at(key.split("."))
                    described = Adapter.model_fields["init_lora_weights"].description or ""
                    assert value in words or value in described, (key, value)


def test_every_row_can_apply() -> None:
    """A row that no recipe meets is a rule nobody can read in a message."""
    choices: dict[str, list[Any]] = {}
    for row in TABLE:
        for key, condition in row.when.items():
            for value in condition if isinstance(condition, tuple) else (condition,):
                sample = {SET: "x", NOT_SET: None, "odd": 3, "not default": "pissa"}.get(str(value), value)
                choices.setdefault(key, []).append(sample)
    for row in TABLE:
        samples = itertools.product(*[[(key, value) for value in choices[key]] for key in row.when])
        assert any(row.applies(dict(sample)) for sample in samples), row


def test_the_device_that_is_found_is_checked_too() -> None:
    recipe = load(None, [*MINIMAL, "scale.strategy=fsdp"]).recipe
    check(recipe)
    check(recipe, device="gpu")
    with pytest.raises(UsageError, match="no FSDP on CPU"):
        check(recipe, device="cpu")


def test_unverified_combinations_are_named() -> None:
    assert unverified(load(None, MINIMAL).recipe) == []
    (note,) = unverified(load(None, [*MINIMAL, "scale.strategy=fsdp"]).recipe)
    assert "scale.strategy=fsdp" in note


def test_each_method_says_which_keys_it_has_no_use_for() -> None:
    assert set(UNUSED) == set(get_args(AdapterMethod))
    assert all(key in Adapter.model_fields for names in UNUSED.values() for key in names)


def test_refused_arguments_exist_in_the_libraries() -> None:
    """The names are transformers' and PEFT's own; a few are those of earlier versions that users still write."""
    import dataclasses

    import peft
    import transformers

    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    earlier = {"group_by_length", "no_cuda", "overwrite_output_dir", "logging_dir", "warmup_ratio"}
    assert set(REFUSED) - fields <= earlier
    configs = (peft.LoraConfig, peft.AdaLoraConfig, peft.PrefixTuningConfig)
    assert set(PEFT_REFUSED) <= {field.name for config in configs for field in dataclasses.fields(config)}


def test_fields_that_decide_the_order_or_the_normaliser_are_refused() -> None:
    must = {
        *("per_device_train_batch_size", "gradient_accumulation_steps", "group_by_length", "dataloader_drop_last"),
        *("remove_unused_columns", "seed", "data_seed", "output_dir", "fsdp", "deepspeed", "bf16", "fp16"),
        *("label_smoothing_factor", "ignore_data_skip", "average_tokens_across_devices", "train_sampling_strategy"),
    }
    assert must <= set(REFUSED)


def test_names_are_checked_against_a_signature() -> None:
    check_names("train.trainer_args", ["adam_beta1"], ["adam_beta1", "adam_beta2"], "TrainingArguments")
    with pytest.raises(UsageError, match=r"adam_beta3.*did you mean adam_beta[12]") as caught:
        check_names("train.trainer_args", ["adam_beta3"], ["adam_beta1", "adam_beta2"], "TrainingArguments")
    assert caught.value.id == "R108"


def test_optimisers_and_schedules_are_those_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert {*OPTIMISERS, *IN_BACKWARD} == {name.value for name in OptimizerNames}
    assert set(SCHEDULES) == {name.value for name in SchedulerType}


def test_every_key_is_documented() -> None:
    assert [key.path for key in keys() if not key.documentation.strip()] == []
    assert Recipe.model_fields.keys() >= {"model", "data", "train", "scale", "adapter", "evaluate"}
