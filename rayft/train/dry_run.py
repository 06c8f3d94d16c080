"""`--dry-run`: what a recipe would do, without a cluster and without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayft import config
from rayft.config.recipe import Recipe

if TYPE_CHECKING:
    from rayft.train.preparation import Preparation


@dataclass(frozen=True)
class DryRun:
    """`values`: (dotted key, value, user | default | derived). `plan` and `memory` are empty where `missing` says why
    not."""

    values: list[tuple[str, Any, str]]
    plan: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    missing: str = ""

    def to_json(self) -> dict[str, Any]:
        recipe = {key: {"value": value, "origin": origin} for key, value, origin in self.values}
        return {"recipe": recipe, "plan": self.plan, "memory_bytes": self.memory, "missing": self.missing}

    def to_rich(self) -> RenderableType:
        recipe = Table(title="Recipe", title_justify="left", box=None)
        for name in ("key", "value", "decided by"):
            recipe.add_column(name, overflow="fold")
        for key, value, origin in self.values:
            recipe.add_row(key, Text(str(value)), Text(origin, style="bold" if origin == "user" else "dim"))
        parts: list[RenderableType] = [recipe, Text()]
        if self.missing:
            parts.append(Text(f"no plan: {self.missing}", style="yellow"))
        else:
            plan = {name.replace("_", " "): _number(value) for name, value in self.plan.items()}
            memory = {name.replace("_", " "): f"{value / 1e9:.2f} GB" for name, value in self.memory.items() if value}
            parts += [_facts("Plan", plan), Text(), _facts("Memory of one worker (estimate)", memory)]
        return Group(*parts)


def dry_run(source: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Sequence[str] = ()) -> DryRun:
    """Resolve the recipe and, where the base is on this machine already, render its data and plan its steps.

    Workers are the recipe's number; `auto` is planned as one, since no cluster is asked. Raises UsageError.
    """
    resolved = config.load(source, overrides)
    values = [(key, value, str(origin)) for key, value, origin in resolved.dry()]
    recipe = resolved.recipe

    from rayft.models import hub

    prepared = prepare_here(recipe)
    if isinstance(prepared, str):
        return DryRun(values, missing=prepared)
    return DryRun(values, _plan(prepared), _memory(prepared, hub.fetch(prepared.base, recipe.model.revision)))


def prepare_here(recipe: Recipe) -> Preparation | str:
    """What `preparation.prepare` settles, found out on this machine and for the recipe's number of workers; or why it
    cannot be: the base is not here. Raises UsageError."""
    from rayft.models import hub
    from rayft.train.preparation import Preparation, base_of, device_here, settle

    base, init_adapter = base_of(recipe)
    if not hub.is_here(base):
        return f"{base} is not on this machine yet (rayft models pull {base})"
    device = device_here(recipe)
    settled = settle(recipe.model_dump(mode="json"), base, device, shared=False)
    asked = recipe.scale.workers
    workers = max(1, asked[1] if isinstance(asked, tuple) else 1 if asked == "auto" else asked)
    return Preparation(recipe, None, device, base, init_adapter, settled, workers)


def _plan(prepared: Preparation) -> dict[str, Any]:
    from rayft.data.micro_batches import micro_steps

    schedule, stats, workers = prepared.schedule, prepared.data.stats, prepared.workers
    micro = prepared.micro_batch_size()
    return {
        "examples": stats["train"]["examples"],
        "validation_examples": stats.get("validation", {}).get("examples", 0),
        "tokens_per_epoch": int(schedule.lengths.sum()),
        "supervised_tokens_per_epoch": stats["train"]["supervised_tokens"],
        "truncated_examples": stats["truncated"],
        "dropped_examples": stats["dropped"],
        "steps_per_epoch": schedule.steps_per_epoch,
        "total_steps": schedule.total_steps,
        "workers": workers,
        "micro_batch_size": micro,
        "micro_steps_per_step": micro_steps(schedule.global_batch_size, workers, micro),
        "dtype": prepared.settled.dtype,
        "device": prepared.device,
    }


def _memory(prepared: Preparation, folder: str) -> dict[str, Any]:
    from rayft.models import memory

    micro = prepared.micro_batch_size()
    estimate = memory.estimate(
        prepared.recipe,
        folder,
        workers=prepared.workers,
        micro_batch_size=micro,
        tokens=micro * int(prepared.schedule.lengths.max()),
        device=prepared.device,
    )
    parts = {f.name: getattr(estimate, f.name) for f in fields(estimate) if "parameters" not in f.name}
    return parts | {"total": estimate.total}


def _facts(title: str, facts: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    return table


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
