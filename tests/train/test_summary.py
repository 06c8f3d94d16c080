"""The report names what is wrong, with evidence, and says nothing about a healthy run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft.config.recipe import Recipe
from rayft.train.summary import write_report
from rayft.train.symptoms import symptoms

STATS: dict[str, Any] = {
    "rows": 100,
    "examples": 100,
    "tokens": 5000,
    "supervised_tokens": 1000,
    "truncated": 0,
    "truncated_tokens": 0,
    "truncated_share": 0.0,
    "zero_supervised": 0,
    "zero_supervised_rows": [],
    "zero_by_truncation": 0,
    "zero_without_answer": 0,
    "train": {"examples": 90, "tokens": 4500, "supervised_tokens": 900},
}
FACTS = {
    "name": "orders",
    "path": "/runs/orders",
    "kind": "adapter",
    "result_step": 40,
    "seconds": 125.0,
    "hashes": {"base": "a" * 64, "data": "b" * 32},
}
STARTED = {
    "kind": "started",
    "time": 0.0,
    "attempt": 0,
    "step": 0,
    "workers": 2,
    "micro_batch_size": 4,
    "dtype": "bf16",
    "strategy": "ddp",
    "trainable_parameters": 5_000,
    "total_parameters": 100_000,
}


def recipe(**changes: Any) -> Recipe:
    data = {
        "name": "orders",
        "model": {"base": "smollm2-135m-instruct"},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16},
        "data": {"train": "orders.jsonl", "max_length": 64},
        "train": {"learning_rate": 1e-3, "global_batch_size": 8},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        data[section] = value if not key else {**data[section], key: value}  # type: ignore[dict-item]
    return Recipe.model_validate(data)


def rows(steps: int = 40, rise: float = 0.0, **scalars: float) -> list[dict[str, Any]]:
    """A healthy run, or one whose validation loss rises by `rise` in its second half."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 2 * math.exp(-step / 10) + 0.1
        row = {"step": step, "time": 10.0 * step, "tokens": 100 * step, "epoch": step / 20, "loss": loss}
        row |= {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1000.0, "data_share": 0.01}
        row |= {"padding_share": 0.0, "report_share": 0.01, "peak_memory_gb": 1.5, **scalars}
        if step % 10 == 0:
            late = max(0, step - steps // 2) / (steps - steps // 2)
            validation = 2 * math.exp(-min(step, steps // 2 if rise else steps) / 10) + 0.2 + rise * late
            row |= {"validation_loss": validation, "perplexity": math.exp(validation), "exact_match": step / 100}
        found.append(row)
    return found


def titles(*, events: Any = (), stats: dict[str, Any] | None = None, **more: Any) -> list[str]:
    given = more.pop("rows", None) or rows()
    found = symptoms(recipe(**more), given, events, {**STATS, **(stats or {})})
    assert all(symptom.evidence and symptom.remedy for symptom in found)
    return [symptom.title for symptom in found]


def test_a_healthy_run_has_no_symptoms() -> None:
    assert titles(events=[STARTED]) == []
    assert "What to look at" not in write_report(recipe(), FACTS, rows(), [STARTED], STATS)


@pytest.mark.parametrize(
    ("title", "given"),
    [
        ("Overfitting", {"rows": rows(rise=0.3)}),
        ("Data-bound", {"rows": rows(data_share=0.3)}),
        ("Much padding", {"rows": rows(padding_share=0.4)}),
        ("Slow saving", {"rows": rows(report_share=0.2)}),
        ("Truncated data", {"stats": {"truncated": 30, "truncated_tokens": 900, "truncated_share": 0.3}}),
        ("Examples without a supervised token", {"stats": {"zero_supervised": 3, "zero_by_truncation": 3}}),
        ("Divergence", {"events": [{"kind": "divergence", "step": 7, "kind_of": "nan", "evidence": "nan"}]}),
        ("Stagnation", {"events": [{"kind": "warning", "step": 9, "kind_of": "stagnation", "evidence": "flat"}]}),
        ("Damaged checkpoints", {"events": [{"kind": "warning", "kind_of": "checkpoint", "evidence": "step 5"}]}),
        (
            "Out of memory",
            {"events": [STARTED, {"kind": "failure", "cause": "oom"}, {**STARTED, "micro_batch_size": 2}]},
        ),
    ],
)
def test_each_symptom_alone(title: str, given: dict[str, Any]) -> None:
    assert titles(**given) == [title]


def test_evidence_has_the_numbers() -> None:
    (overfitting,) = symptoms(recipe(), rows(rise=0.3), [], STATS)
    assert "From step 20 to 40" in overfitting.evidence and "load_best_model_at_end: true" in overfitting.remedy
    (kept,) = symptoms(recipe(train__load_best_model_at_end=True), rows(rise=0.3), [], STATS)
    assert "checkpoint of step 20" in kept.remedy
    events = [STARTED, {"kind": "failure", "cause": "oom", "peak_memory": 3.2e9}, {**STARTED, "micro_batch_size": 2}]
    (memory,) = symptoms(recipe(), rows(), events, STATS)
    assert "with 4 examples" in memory.evidence and "3.2 GB" in memory.evidence
    assert "train.micro_batch_size: 2" in memory.remedy
    stats = {**STATS, "zero_supervised": 2, "zero_without_answer": 2, "zero_supervised_rows": ["orders.jsonl:7"]}
    (zero,) = symptoms(recipe(), rows(), [], stats)
    assert "2 rows of 100" in zero.evidence and "orders.jsonl:7" in zero.evidence and "train_on" in zero.remedy


def test_remedies_fit_the_recipe() -> None:
    def padding(**changes: Any) -> str:
        return symptoms(recipe(**changes), rows(padding_share=0.4), [], STATS)[0].remedy

    assert "padding_free: true" in padding(data__padding_free=False)
    assert "padding_free" not in padding()
    diverged = [{"kind": "divergence", "step": 3, "kind_of": "nan", "evidence": "the loss is nan"}]
    remedy = symptoms(recipe(train__on_divergence="rollback"), rows(), diverged, STATS)[0].remedy
    assert "rollback" not in remedy and "it was 0.001" in remedy


def test_a_small_rise_near_zero_is_no_overfitting() -> None:
    flat = rows()
    for row, loss in zip(flat[9::10], (0.5, 0.012, 0.011, 0.013), strict=True):
        row["validation_loss"] = loss
    assert titles(rows=flat) == []


def test_the_report() -> None:
    restart = {"kind": "restart", "time": 0.0, "step": 20, "lost_steps": 3, "reason": "a worker | died"}
    sample = {"prompt": "two\ntacos", "text": "```{}```", "reference": '{"n": 2}'}
    events = [STARTED, restart, {"kind": "samples", "step": 40, "samples": [sample]}]
    text = write_report(recipe(), FACTS, rows(), events, STATS)
    assert text.startswith("# orders\n\nValidation loss from 0.9358 to 0.2366 in 40 steps and 2m05s.\n")
    assert "`smollm2-135m-instruct` (`aaaaaaaaaaaa`)" in text and "LoRA, rank 8, alpha 16" in text
    assert "5,000 of 100,000 (5.00%)" in text and "90, 4,500 tokens, 20% of them supervised" in text
    assert "4,000 tokens in 40 steps, 2 epochs" in text
    assert "| validation loss | 0.9358 | 0.2366 | 0.2366 |" in text and "| exact match | 0.1 | 0.4 | 0.4 |" in text
    assert "| tokens/s | 1,000 |" in text and "| peak memory of a worker | 1.50 GB |" in text
    assert "grad norm" not in text  # a counter of training, not a result
    assert "| 1970-01-01 00:00:00 | 20 | 3 | a worker \\| died |" in text
    assert '````text\nasked   two tacos\nanswer  ```{}```\nwanted  {"n": 2}\n````' in text
    assert "![Loss over optimiser steps](loss.png)" in text
    assert "rayft evaluate /runs/orders" in text and 'load_trained("/runs/orders/adapter")' in text


def test_tables_are_rectangular() -> None:
    text = write_report(recipe(), FACTS, rows(), [STARTED], STATS)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


@pytest.mark.parametrize("given", [[], [{"step": 1, "loss": None}], [{"step": 0, "validation_loss": 2.0}]])
def test_a_run_that_hardly_began_has_a_report(given: list[dict[str, Any]]) -> None:
    text = write_report(recipe(), {"name": "orders", "path": "/runs/orders"}, given, [], {}, picture=None)
    assert "## What ran" in text and "rayft train /runs/orders --resume" in text and "loss.png" not in text


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"adapter": None}, "full fine-tuning"),
        ({"adapter": None, "train__trainable": {"last_blocks": 2}}, "part of the weights"),
        ({"adapter__method": "prefix"}, "prefix tuning, 20 virtual tokens"),
        ({"model__quantization": "nf4", "adapter__use_dora": True}, "LoRA, rank 8, alpha 16 on a base in nf4, DoRA"),
    ],
)
def test_methods_by_name(changes: dict[str, Any], method: str) -> None:
    assert f"| method | {method}" in write_report(recipe(**changes), FACTS, rows(), [], STATS)
