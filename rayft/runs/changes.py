"""How the recipe that a run is resumed with differs from its own, and which differences change its mathematics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayft.config.recipe import Recipe
from rayft.config.resolve import leaves

# Where and how fast the same numbers are computed, when they are saved and who is told. Everything else in a recipe
# decides which numbers come out.
FREE = (
    "storage",
    "scale",
    "evaluate",
    "tune",
    "federate",
    "serve",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.torch_compile",
    "train.dataloader_num_workers",
    "train.dataloader_prefetch_factor",
    "train.dataloader_pin_memory",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.on_divergence",
    "train.report_to",
)


@dataclass(frozen=True)
class Change:
    """One key with another value. ``free`` = the run may go on with it."""

    key: str
    before: Any
    after: Any

    @property
    def free(self) -> bool:
        return any(self.key == free or self.key.startswith(f"{free}.") for free in FREE)

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


_ABSENT = object()


def changes(before: Recipe, after: Recipe) -> list[Change]:
    """The keys whose values differ, in the recipe's order."""
    old = dict(leaves(before.model_dump(mode="json")))
    new = dict(leaves(after.model_dump(mode="json")))
    keys = [*old, *(key for key in new if key not in old)]
    pairs = ((key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys)
    return [Change(key, a, b) for key, a, b in pairs if a != b]


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else repr(value)
