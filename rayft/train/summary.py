"""`report.md`: what ran, what came out, what happened on the way, what to look at, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from rayft.config.recipe import Recipe
from rayft.train.markdown import number, table
from rayft.train.progress import duration, shorten
from rayft.train.recorder import Event, Row
from rayft.train.symptoms import symptoms

METHODS = {
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "ia3": "IA3",
    "oft": "OFT",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
    "p_tuning": "P-tuning",
}
COUNTERS = {
    "step",
    "time",
    "tokens",
    "epoch",
    "loss",
    "learning_rate",
    "padding_tokens",
    "supervised_tokens",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "seconds_per_step",
    "padding_share",
    "data_share",
    "report_share",
    "peak_memory_gb",
    "device_memory_gb",
    "mfu",
}
"""Scalars of training; whatever else an evaluated step has was measured by the evaluation."""


def write_report(
    recipe: Recipe,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    events: Sequence[Event],
    stats: Mapping[str, Any],
    picture: str | None = "loss.png",
) -> str:
    """The Markdown text of a run's report.

    facts: name, path, and, where known, kind ("adapter" | "model"), result_step, seconds (wall time), hashes (of base,
    data, template). rows, events: `Recorder.rows()` and `.events()`. stats: `Prepared.stats`. picture: file name of the
    loss curve beside the report.
    """
    sections = [
        f"# {facts['name']}",
        _headline(facts, rows),
        f"## What ran\n\n{_what_ran(recipe, facts, rows, events, stats)}",
        f"## Result\n\n{_result(facts, rows)}",
    ]
    if picture:
        sections.append(f"![Loss over optimiser steps]({picture})")
    found = symptoms(recipe, rows, events, stats)
    if found:
        lines = [f"- **{symptom.title}.** {symptom.evidence} *{symptom.remedy}*" for symptom in found]
        sections.append("## What to look at\n\n" + "\n".join(lines))
    restarts = [event for event in events if event["kind"] == "restart"]
    if restarts:
        sections.append(f"## Restarts\n\n{_restarts(restarts)}")
    samples = [event for event in events if event["kind"] == "samples"]
    if samples:
        sections.append(f"## Samples at step {samples[-1]['step']}\n\n{_samples(samples[-1]['samples'])}")
    sections.append(f"## Next\n\n{_next(facts)}")
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """One sentence with what matters."""
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    name = "validation_loss" if len(evaluated) > 1 else "loss"
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    steps = f" in {rows[-1]['step']} steps"
    time = f" and {duration(facts['seconds'])}" if facts.get("seconds") else ""
    return f"{name.replace('_', ' ').capitalize()} from {values[0]:.4g} to {values[-1]:.4g}{steps}{time}."


def _what_ran(
    recipe: Recipe, facts: Mapping[str, Any], rows: Sequence[Row], events: Sequence[Event], stats: Mapping[str, Any]
) -> str:
    hashes = facts.get("hashes", {})
    started = next((event for event in reversed(events) if event["kind"] == "started"), {})
    train = recipe.train
    lines = [("base", f"`{recipe.model.base}`{_hash(hashes.get('base'))}"), ("method", _method(recipe))]
    if "trainable_parameters" in started:
        trained, total = started["trainable_parameters"], started["total_parameters"]
        lines.append(("trainable parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"))
    sources = ", ".join(f"`{source.path}`" for source in recipe.data.train)
    lines.append(("data", f"{sources}{_hash(hashes.get('data'))}"))
    split = stats.get("train", stats)
    if "examples" in split:
        share = split["supervised_tokens"] / max(1, split["tokens"])
        amount = f"{split['examples']:,}, {split['tokens']:,} tokens, {share:.0%} of them supervised"
        lines.append(("examples", amount + (f", packed into {split['bins']:,} rows" if "bins" in split else "")))
    if rows:
        tokens = max(row.get("tokens") or 0 for row in rows)
        epochs = next((f", {row['epoch']:.3g} epochs" for row in reversed(rows) if "epoch" in row), "")
        lines.append(("trained on", f"{tokens:,} tokens in {rows[-1]['step']:,} steps{epochs}"))
    batch = f"{train.global_batch_size} {'rows' if recipe.data.packing else 'examples'} per step"
    if started:
        workers = started["workers"]
        batch += f"; {workers} worker{'s' if workers != 1 else ''} ({started['strategy']})"
        batch += f", {started['micro_batch_size']} at a time, {started['dtype']}"
    lines.append(("batch", batch))
    rate = f", learning rate {train.learning_rate:g}" if train.learning_rate is not None else ""
    lines.append(("optimiser", f"{train.optim}{rate}, {train.lr_scheduler_type} schedule"))
    lines.append(("seed", str(recipe.seed)))
    return table(["", ""], lines)


def _method(recipe: Recipe) -> str:
    adapter = recipe.adapter
    if adapter is None:
        return "full fine-tuning" if recipe.train.trainable is None else "part of the weights (`train.trainable`)"
    size = ""
    if adapter.method in ("lora", "adalora", "oft"):
        size = f", rank {adapter.rank}" + (f", alpha {adapter.alpha:g}" if adapter.method != "oft" else "")
    elif adapter.method in ("prefix", "prompt", "p_tuning"):
        size = f", {adapter.num_virtual_tokens} virtual tokens"
    variants = [name for name, on in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if on]
    if adapter.loraplus_lr_ratio:
        variants.append("LoRA+")
    if isinstance(adapter.init_lora_weights, str):
        variants.append(f"initialised with {adapter.init_lora_weights}")
    base = f" on a base in {recipe.model.quantization}" if recipe.model.quantization else ""
    return ", ".join([METHODS[adapter.method] + size + base, *variants])


def _result(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Losses and metrics at the first, the best and the last evaluation; then speed and memory."""
    parts = []
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        best = min(evaluated, key=lambda row: row["validation_loss"])
        names = [name for name in last if name not in COUNTERS and not name.startswith("grad_norm")]
        columns = [(f"first (step {first['step']})", first), (f"best (step {best['step']})", best)]
        columns.append((f"last (step {last['step']})", last))
        lines = [(name.replace("_", " "), *(number(row.get(name)) for _, row in columns)) for name in names]
        parts.append(table(["", *(title for title, _ in columns)], lines))
    lines = []
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if losses:
        lines.append(("training loss", f"{losses[0]:.4g} → {losses[-1]:.4g}"))
    for name, unit in (("tokens_per_second", "tokens/s"), ("supervised_tokens_per_second", "supervised tokens/s")):
        values = [row[name] for row in rows[1:] if row.get(name) is not None]
        if values:
            lines.append((unit, f"{median(values):,.0f}"))
    if facts.get("seconds"):
        lines.append(("wall time", duration(facts["seconds"])))
    for name, label in (("peak_memory_gb", "peak memory of a worker"), ("device_memory_gb", "peak memory of a device")):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            lines.append((label, f"{max(values):.2f} GB"))
    shares = [row["mfu"] for row in rows[1:] if row.get("mfu") is not None]
    if shares:
        lines.append(("model FLOP/s utilisation (estimate)", f"{median(shares):.0%}"))
    if facts.get("result_step") is not None:
        lines.append((f"`{facts.get('kind', 'adapter')}/`", f"the checkpoint of step {facts['result_step']}"))
    if lines:
        parts.append(table(["", ""], lines))
    return "\n\n".join(parts) or "Nothing was logged."


def _restarts(restarts: Sequence[Event]) -> str:
    lines = [
        (
            datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            str(event["step"]),
            str(event.get("lost_steps", 0)),
            event.get("reason") or "",
        )
        for event in restarts
    ]
    listed = table(["time (UTC)", "from step", "steps done again", "reason"], lines)
    return f"{listed}\n\nEvery step counts once: what came after the checkpoint was dropped and computed again."


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    labels = (("asked", "prompt"), ("answer", "text"), ("wanted", "reference"))
    blocks = [
        "\n".join(f"{label:<6}  {shorten(sample[name], 400)}" for label, name in labels if sample.get(name))
        for sample in samples
    ]
    text = "\n\n".join(blocks)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _next(facts: Mapping[str, Any]) -> str:
    path, kind = facts["path"], facts.get("kind")
    if kind is None:
        return f"```sh\nrayft train {path} --resume\n```"
    commands = f"rayft evaluate {path}    # the validation data, beside the base\nrayft runs show {facts['name']}"
    python = f'from rayft.models.save import load_trained\n\nmodel, tokenizer = load_trained("{path}/{kind}")'
    return f"```sh\n{commands}\n```\n\n```python\n{python}\n```"


def _hash(value: str | None) -> str:
    return f" (`{value[:12]}`)" if value else ""
