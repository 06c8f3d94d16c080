"""Pack or classic: how the trials of a sweep are trained, and why; and whether what they are compared by exists."""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from typing import Literal

from rayft.config.recipe import Recipe
from rayft.config.tune import Tune
from rayft.errors import UsageError
from rayft.metrics.registry import label
from rayft.multilora.suits import differs, why_not
from rayft.tune.space import DRAWS, Space

FACTS = ("trainable_parameters", "tokens_per_second", "peak_memory_gb")
"""What is known of a trial besides its evaluations."""


@dataclass(frozen=True)
class Chosen:
    """`reason`: a sentence without its full stop."""

    mode: Literal["pack", "classic"]
    reason: str


def choose(space: Space, recipe: Recipe, tune: Tune) -> Chosen:
    """How the sweep is run. Raises UsageError R724 when packs are asked for and are not possible."""
    if tune.execution == "classic":
        return Chosen("classic", "tune.execution asks for it")
    obstacle = _obstacle(space, recipe, tune)
    if obstacle is None:
        return Chosen("pack", "the trials are LoRA adapters that can share one base")
    if tune.execution == "pack":
        raise UsageError("R724", f"tune.execution is pack, and {obstacle}", "tune.execution=auto or classic")
    return Chosen("classic", obstacle)


def check_metrics(recipe: Recipe, tune: Tune) -> None:
    """Raises UsageError R723 for an objective or constraint that no evaluation of this recipe produces."""
    evaluated = ["validation_loss", "perplexity"] if recipe.data.validation is not None else []
    generated = [label(name) for name in recipe.evaluate.metrics] if evaluated else []
    known = [*evaluated, *generated, "loss", *FACTS]
    for name in [*(metric for metric, _ in tune.objectives), *tune.constraints]:
        if name in known:
            continue
        hint = f"known: {', '.join(known)}"
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if near:
            hint = f"did you mean {near[0]}?"
        elif name in ("validation_loss", "perplexity"):
            hint = "data.validation=0.1 holds out examples, or tune.metric=loss compares the training loss"
        raise UsageError("R723", f"tune: no evaluation of this recipe produces {name!r}", hint)


def _obstacle(space: Space, recipe: Recipe, tune: Tune) -> str | None:
    """Why packs are not possible: for the recipe itself, for a point of the space, or for what is measured."""
    if tune.scheduler == "pbt":
        return "tune.scheduler pbt clones whole runs"
    generated = {label(name) for name in recipe.evaluate.metrics}
    for metric, _ in tune.objectives:
        if metric in generated:
            return f"tune.metric {metric} needs generated answers, which a pack does not give"
    if isinstance(recipe.scale.workers, tuple) or (isinstance(recipe.scale.workers, int) and recipe.scale.workers > 1):
        return "scale.workers asks for several workers per trial"
    rng = random.Random(0)
    first: Recipe | None = None
    for point in (space.draw(rng) for _ in range(DRAWS)):
        try:
            trial = space.recipe(point)
        except UsageError:  # such points are left out of the sweep too
            continue
        first = first or trial
        if reason := why_not(trial):
            return f"not every point of the space suits a pack: {reason}"
        if reason := differs(trial, first):
            return f"points of the space cannot share a pack: {reason}"
    return None
