"""What a run's rows, events and data say is wrong with it: evidence and a remedy for each symptom, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rayft.config.recipe import Recipe
from rayft.train.recorder import Event, Row


@dataclass(frozen=True)
class Symptom:
    """One thing that is wrong. Markdown sentences; remedies name keys of the recipe."""

    title: str
    evidence: str
    remedy: str


def symptoms(recipe: Recipe, rows: Sequence[Row], events: Sequence[Event], stats: Mapping[str, Any]) -> list[Symptom]:
    """All symptoms of a run, the gravest first; empty for a healthy one. `stats` are those of `Prepared`."""
    found = (
        _divergence(recipe, events),
        _zero_supervised(stats),
        _overfitting(recipe, rows),
        _stagnation(recipe, events),
        _truncated(recipe, stats),
        _out_of_memory(events),
        _data_bound(recipe, rows),
        _padding(recipe, rows),
        _slow_saving(rows),
        _damaged_checkpoints(events),
    )
    return [symptom for symptom in found if symptom is not None]


def mean_of(rows: Sequence[Row], name: str) -> float | None:
    """Mean of a scalar over the rows that have it. The first row is left out: it holds one-off costs."""
    values = [row[name] for row in rows[1:] if row.get(name) is not None]
    return fmean(values) if values else None


def _divergence(recipe: Recipe, events: Sequence[Event]) -> Symptom | None:
    times = [event for event in events if event["kind"] == "divergence"]
    if not times:
        return None
    evidence = " ".join(f"At step {event['step']}: {event['evidence']}." for event in times)
    rate = recipe.train.learning_rate
    remedies = [f"a lower `train.learning_rate`{f' (it was {rate:g})' if rate else ''}", "more `train.warmup_steps`"]
    if recipe.train.max_grad_norm == 0:
        remedies.append("`train.max_grad_norm: 1.0`")
    if recipe.model.dtype == "fp16":
        remedies.append("`model.dtype: bf16`, whose range is that of fp32")
    if recipe.train.on_divergence != "rollback":
        remedies.append("`train.on_divergence: rollback`, which goes back and halves the rate by itself")
    return Symptom("Divergence", evidence, f"Try {_either(remedies)}.")


def _zero_supervised(stats: Mapping[str, Any]) -> Symptom | None:
    zero = stats.get("zero_supervised", 0)
    if not zero:
        return None
    cut, silent = stats.get("zero_by_truncation", 0), stats.get("zero_without_answer", 0)
    reasons = []
    if cut:
        reasons.append(f"{cut} lost the answer to truncation")
    if silent:
        reasons.append(f"{silent} have no assistant message")
    where = ", ".join(f"`{place}`" for place in stats.get("zero_supervised_rows", []))
    evidence = f"{_count(zero, 'row')} of {stats['rows']} had no token to train on and were left out"
    evidence += f" ({'; '.join(reasons)})" if reasons else ""
    evidence += f". The first of them: {where}." if where else "."
    mostly_cut = 2 * cut > zero
    remedy = "Raise `data.max_length`." if mostly_cut else "Look at these rows, `data.columns` and `data.train_on`."
    return Symptom("Examples without a supervised token", evidence, remedy)


def _overfitting(recipe: Recipe, rows: Sequence[Row]) -> Symptom | None:
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    if len(evaluated) < 2:
        return None
    best, last = min(evaluated, key=lambda row: row["validation_loss"]), evaluated[-1]
    rise = last["validation_loss"] - best["validation_loss"]
    if rise < 0.01 or rise < 0.03 * best["validation_loss"]:
        return None
    before, after = _training_loss(rows, best["step"]), _training_loss(rows, last["step"])
    if before is None or after is None or after >= before:
        return None
    evidence = (
        f"From step {best['step']} to {last['step']} the validation loss rose from {best['validation_loss']:.4g} to "
        f"{last['validation_loss']:.4g}, while the training loss fell from {before:.4g} to {after:.4g}."
    )
    remedies = ["fewer `train.epochs`", "more data", "a lower `train.learning_rate`"]
    if recipe.adapter is not None:
        remedies.append("a smaller `adapter.rank` or some `adapter.dropout`")
    if recipe.train.early_stopping_patience is None:
        remedies.append("`train.early_stopping_patience: 2`")
    kept = (
        f"The result is the checkpoint of step {best['step']}, before the rise."
        if recipe.train.load_best_model_at_end
        else "`train.load_best_model_at_end: true` makes the best checkpoint the result."
    )
    return Symptom("Overfitting", evidence, f"{kept} Against the cause: {_either(remedies)}.")


def _training_loss(rows: Sequence[Row], step: int) -> float | None:
    """Mean training loss of the ten rows up to `step`."""
    values = [row["loss"] for row in rows if row.get("loss") is not None and row["step"] <= step][-10:]
    return fmean(values) if values else None


def _stagnation(recipe: Recipe, events: Sequence[Event]) -> Symptom | None:
    times = [event for event in events if event["kind"] == "warning" and event.get("kind_of") == "stagnation"]
    if not times:
        return None
    evidence = f"At step {times[-1]['step']} {times[-1]['evidence']}."
    remedies = ["a higher `train.learning_rate` (three times as high is a usual next try)"]
    if recipe.adapter is not None and recipe.adapter.target_modules != "all-linear":
        remedies.append("`adapter.target_modules: all-linear`")
    if recipe.adapter is None and recipe.train.trainable is not None:
        remedies.append("more weights in `train.trainable`")
    remedies.append("a look at which tokens are supervised (`data.train_on`)")
    return Symptom("Stagnation", evidence, f"Try {_either(remedies)}.")


def _truncated(recipe: Recipe, stats: Mapping[str, Any]) -> Symptom | None:
    share = stats.get("truncated_share", 0.0)
    if share < 0.01:
        return None
    evidence = (
        f"{share:.0%} of the rows ({stats['truncated']}) are longer than `data.max_length: {recipe.data.max_length}`; "
        f"{stats['truncated_tokens']:,} tokens were cut off at their ends, where answers stand."
    )
    return Symptom("Truncated data", evidence, "Raise `data.max_length`, or split long examples before training.")


def _out_of_memory(events: Sequence[Event]) -> Symptom | None:
    times = [event for event in events if event["kind"] == "failure" and event["cause"] == "oom"]
    if not times:
        return None
    attempts = [event for event in events if event["kind"] == "started"]
    if not attempts:
        return None
    first, last = attempts[0]["micro_batch_size"], attempts[-1]["micro_batch_size"]
    peak = max(event.get("peak_memory", 0) for event in times)
    evidence = f"Memory ran out with {first} examples per forward pass"
    evidence += f" (measured peak {peak / 1e9:.1f} GB)" if peak else ""
    evidence += f"; the run went on with {last}. The losses are the same, only time was lost."
    return Symptom("Out of memory", evidence, f"Set `train.micro_batch_size: {last}` to save the detour.")


def _data_bound(recipe: Recipe, rows: Sequence[Row]) -> Symptom | None:
    share = mean_of(rows, "data_share")
    if share is None or share < 0.1:
        return None
    workers = max(2, 2 * recipe.train.dataloader_num_workers)
    return Symptom(
        "Data-bound",
        f"{share:.0%} of the training time was spent waiting for data.",
        f"Set `train.dataloader_num_workers: {workers}`, and keep `storage` on a fast disk.",
    )


def _padding(recipe: Recipe, rows: Sequence[Row]) -> Symptom | None:
    share = mean_of(rows, "padding_share")
    if share is None or share < 0.2:
        return None
    remedy = "`data.packing: true` fills rows to `data.max_length`"
    if not recipe.data.padding_free:
        remedy = "`data.padding_free: true` computes none of it and gives the same losses; " + remedy
    return Symptom("Much padding", f"{share:.0%} of the computed tokens were padding.", f"{remedy}.")


def _slow_saving(rows: Sequence[Row]) -> Symptom | None:
    share = mean_of(rows, "report_share")
    if share is None or share < 0.1:
        return None
    return Symptom(
        "Slow saving",
        f"{share:.0%} of the training time was spent on checkpoints and reports.",
        "Save less often with a larger `train.save_steps`, or use a faster `storage`.",
    )


def _damaged_checkpoints(events: Sequence[Event]) -> Symptom | None:
    times = [event for event in events if event["kind"] == "warning" and event.get("kind_of") == "checkpoint"]
    if not times:
        return None
    evidence = " ".join(f"{event['evidence']}." for event in times)
    return Symptom("Damaged checkpoints", evidence, "The run went on from an older one. Check the disk of `storage`.")


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])}, or {options[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
