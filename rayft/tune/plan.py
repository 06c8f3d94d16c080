"""Everything about a sweep that is settled before its first trial: space, mode, lanes, budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayft import config
from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved
from rayft.config.tune import Tune
from rayft.data import Prepared
from rayft.data.schedule import StepSchedule
from rayft.runtime.package import user_values
from rayft.train.preparation import Preparation, elsewhere, prepare
from rayft.tune.mode import Chosen, check_metrics, choose
from rayft.tune.prior import default_space
from rayft.tune.space import Space, Values

MOST = 64
"""Adapters of a pack that nobody has given a size."""


@dataclass(frozen=True)
class Plan:
    asked: Resolved
    """The recipe with its space in full, for the run's folder."""
    resolved: Resolved
    """And with its number format decided, for the trials: a winner is trained again as it was."""
    prepared: Preparation
    space: Space
    chosen: Chosen
    lanes: int
    """Packs, or classic trials, side by side."""
    most: int
    """Adapters at once in a pack."""
    budget: float
    """Age of a trial at its end, in `scheduler_args.time_attr`."""
    first: list[Values] = field(default_factory=list)
    workers: int | tuple[int, int] = 0
    """classic: training processes per trial, 0 = in the trial's own process."""
    interval: int | None = None
    """pbt: optimiser steps between two looks at a trial."""

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def tune(self) -> Tune:
        return self.recipe.tune or Tune()

    @property
    def resources(self) -> dict[str, float]:
        """Of a lane."""
        if self.workers != 0:  # Ray Train asks for the workers' own; the trial itself only waits for them
            return {"node:__internal_head__": 0.001}
        return dict(self.prepared.placement.resources)

    def settings(self) -> dict[str, Any]:
        """In words, for people."""
        tune = self.tune
        shown: dict[str, Any] = {"search": tune.search_alg, "early stopping": tune.scheduler, "lanes": self.lanes}
        if self.chosen.mode == "pack":
            grows = tune.pack_size == "auto"
            shown["adapters per pack"] = f"up to {self.most}, as throughput and memory allow" if grows else self.most
        return shown


def make(resolved: Resolved) -> Plan:
    """Settle a sweep: check the space, find the cluster and its room, fetch the base, render the data.

    Raises UsageError: R720 to R724 of the section `tune`, and those of `rayft.train.preparation.prepare`.
    """
    recipe, tune = resolved.recipe, resolved.recipe.tune or Tune()
    check_metrics(recipe, tune)
    space = Space.of(resolved, tune.space or default_space(recipe, 2048, "llama")[0])
    if tune.space:
        space.check(tune.points_to_evaluate)
    chosen = choose(space, recipe, tune)
    shaped, workers = _shaped(recipe, tune, chosen)
    prepared = prepare(shaped)
    first: list[Values] = []
    distributions = tune.space
    if not tune.space:
        distributions, prior = _searched_by_default(prepared)
        first = [prior]
    asked = _with(resolved, Space.of(resolved, distributions))
    decided = _with(resolved, Space.of(resolved, distributions), dtype=prepared.settled.dtype)
    space = Space.of(decided)
    space.check(tune.points_to_evaluate)
    per_trial = workers if isinstance(workers, int) else workers[0]
    room = prepared.placement.workers[0] // max(1, per_trial) if prepared.placement is not None else 1
    limit = min(
        tune.max_concurrent_trials or math.inf, len(space.grid()) if tune.search_alg == "grid" else tune.num_samples
    )
    lanes = max(1, min(room, int(limit)))
    most = min(MOST if tune.pack_size == "auto" else tune.pack_size, max(1, int(limit) // lanes))
    budget = _budget(prepared.schedule, recipe, tune)
    interval = _interval(tune, space, budget)
    return Plan(asked, decided, prepared, space, chosen, lanes, most, budget, first, workers, interval)


def _shaped(recipe: Recipe, tune: Tune, chosen: Chosen) -> tuple[Recipe, int | tuple[int, int]]:
    """(the recipe whose workers are the sweep's lanes, training processes per trial)."""
    asked = recipe.scale.workers
    if asked == 0:
        return recipe, 0
    per_trial: int | tuple[int, int] = 0 if asked in ("auto", 1) else asked  # type: ignore[assignment]  # `in` narrows nothing
    if chosen.mode == "pack" or per_trial == 0:
        return _with_lanes(recipe, tune, one_per_node=chosen.mode == "pack"), 0
    least = per_trial if isinstance(per_trial, int) else per_trial[0]
    workers = "auto" if tune.lanes == "auto" else least * tune.lanes
    return _scaled(recipe, workers=workers), per_trial


def _with_lanes(recipe: Recipe, tune: Tune, *, one_per_node: bool) -> Recipe:
    """One lane per GPU. On CPUs one pack per node with all of its cores, or as many classic trials as there is room."""
    from rayft.runtime import session
    from rayft.runtime.cluster import snapshot

    session.connect(recipe)
    cluster = snapshot()
    gpu = recipe.scale.device == "gpu" or (recipe.scale.device == "auto" and cluster.total("GPU") > 0)
    lanes = tune.lanes
    if lanes == "auto" and not gpu and one_per_node:
        lanes = len(cluster.nodes)
    if lanes != "auto" and tune.max_concurrent_trials:
        lanes = min(lanes, tune.max_concurrent_trials)
    cpus = recipe.scale.cpus_per_worker
    if cpus is None and not gpu and lanes != "auto":
        per_node = math.ceil(lanes / len(cluster.nodes))
        cpus = max(1, int(min(node.total.get("CPU", 1) for node in cluster.nodes)) // per_node)
    return _scaled(recipe, workers=lanes, cpus_per_worker=cpus)


def _scaled(recipe: Recipe, **scale: Any) -> Recipe:
    return recipe.model_copy(update={"scale": recipe.scale.model_copy(update=scale)})


def _searched_by_default(prepared: Preparation) -> tuple[dict[str, Any], Values]:
    settled = prepared.settled
    plain = prepared.recipe.model_dump(mode="json")
    facts = elsewhere(prepared.placement, base_facts, plain, prepared.base, settled.data_folder, settled.data_hash)
    return default_space(prepared.recipe, **facts)


def base_facts(recipe_data: dict[str, Any], base: str, data_folder: str, data_hash: str) -> dict[str, Any]:
    """On a node that has the base: the arguments of `default_space`."""
    from transformers import AutoConfig

    from rayft.models import hub, memory

    recipe = Recipe.model_validate(recipe_data)
    folder = hub.fetch(base, recipe.model.revision)
    found = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    per_rank = None
    if recipe.adapter is not None and recipe.adapter.method == "lora":
        smallest = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": 1})})
        per_rank = memory.estimate(smallest, folder).trainable_parameters
    return {
        "hidden_size": found.get_text_config().hidden_size,
        "model_type": found.model_type,
        "tokens": Prepared(data_folder, data_hash).stats["train"]["supervised_tokens"],
        "parameters_per_rank": per_rank,
    }


def _with(resolved: Resolved, space: Space, **model: Any) -> Resolved:
    """The recipe with this space and these values of its section `model`."""
    plain = user_values(resolved)
    described: Mapping[str, Any] = {
        path: item.model_dump(mode="json", exclude_defaults=True) for path, item in space.distributions.items()
    }
    plain["model"] = plain["model"] | model
    plain["tune"] = plain.get("tune", {}) | {"space": described}
    return config.load(plain)


def _interval(tune: Tune, space: Space, budget: float) -> int | None:
    """Raises UsageError R725 for a population whose space has nothing that may change during a run."""
    if tune.scheduler != "pbt":
        return None
    from rayft.tune.population import interval_of, mutations

    mutations(space.distributions)
    return interval_of(tune, budget)


def _budget(schedule: StepSchedule, recipe: Recipe, tune: Tune) -> float:
    """Age of a trial of the recipe as it stands when it ends."""
    if tune.scheduler_args.time_attr == "tokens":
        return schedule.tokens_before(schedule.total_steps)
    if tune.scheduler_args.time_attr == "training_iteration":
        return math.ceil(schedule.total_steps / schedule.every(recipe.train.eval_steps, schedule.steps_per_epoch))
    return schedule.total_steps
