"""`rayft tune --dry-run`: what would be searched, how and why, without a cluster and without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayft import config
from rayft.config.recipe import Recipe
from rayft.config.tune import Tune
from rayft.train.dry_run import DryRun
from rayft.train.dry_run import dry_run as train_dry_run
from rayft.tune.mode import check_metrics, choose
from rayft.tune.prior import default_space
from rayft.tune.space import Space, described


@dataclass(frozen=True)
class TuneDryRun:
    """`space`: path -> distribution in words. `plan`: the sweep. `trial`: what the recipe would do without a sweep."""

    space: dict[str, str]
    mode: str
    reason: str
    plan: dict[str, Any]
    trial: DryRun

    def to_json(self) -> dict[str, Any]:
        return {
            "space": self.space,
            "mode": self.mode,
            "reason": self.reason,
            "sweep": self.plan,
            **self.trial.to_json(),
        }

    def to_rich(self) -> RenderableType:
        space = Table("key", "drawn from", title="Space", title_justify="left", box=None)
        for path, text in self.space.items():
            space.add_row(path, Text(text))
        sweep = Table(title="Sweep", title_justify="left", show_header=False, box=None)
        for name, value in {"mode": f"{self.mode}: {self.reason}", **self.plan}.items():
            sweep.add_row(name, Text(str(value)))
        return Group(self.trial.to_rich(), Text(), space, Text(), sweep)


def dry_run(source: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Sequence[str] = ()) -> TuneDryRun:
    """Check the space and choose the mode; plan one trial where the base is on this machine. Raises UsageError."""
    resolved = config.load(source, overrides)
    recipe, tune = resolved.recipe, resolved.recipe.tune or Tune()
    check_metrics(recipe, tune)
    distributions = tune.space or default_space(recipe, *_width(recipe))[0]
    space = Space.of(resolved, distributions)
    space.check(tune.points_to_evaluate)
    chosen = choose(space, recipe, tune)
    trials = len(space.grid()) if tune.search_alg == "grid" else tune.num_samples
    compared = ", ".join(f"{'lowest' if mode == 'min' else 'highest'} {metric}" for metric, mode in tune.objectives)
    plan = {
        "trials": trials,
        "objective": compared,
        "search": tune.search_alg,
        "early stopping": "none" if len(tune.objectives) > 1 else tune.scheduler,
        "lanes": tune.lanes,
        "adapters per pack": tune.pack_size if chosen.mode == "pack" else "one trial, one run",
        "repeats": tune.repeats,
    }
    return TuneDryRun(dict(described(space)), chosen.mode, chosen.reason, plan, train_dry_run(source, overrides))


def _width(recipe: Recipe) -> tuple[int, str]:
    """(hidden size, family) of the base; those of the prior's reference model where it is not on this machine."""
    from rayft.models import hub
    from rayft.train.preparation import base_of

    base, _ = base_of(recipe)
    if not hub.is_here(base):
        return 2000, "llama"
    from transformers import AutoConfig

    folder = hub.fetch(base, recipe.model.revision)
    found = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    return found.get_text_config().hidden_size, found.model_type
