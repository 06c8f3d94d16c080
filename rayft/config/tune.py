"""``tune:`` what a sweep searches, how it proposes, when it stops a trial and how many run at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from rayft.config.section import Section

Mode = Literal["min", "max"]
KINDS = ("choice", "grid_search", "uniform", "loguniform", "quniform", "randint", "lograndint")
"""Ray Tune's own names of what a key can be drawn from."""


class Distribution(Section):
    """How one key is searched: one of the first seven keys, named and bounded as in Ray Tune."""

    choice: list[Any] | None = None
    """One of these values, of any kind that the key takes: numbers, names, lists, whole sections."""
    grid_search: list[Any] | None = None
    """Each of these values, with every combination of the others; needs `search_alg: grid`."""
    uniform: list[float] | None = None
    """[lower, upper]."""
    loguniform: list[float] | None = None
    """[lower, upper], each power of ten as likely as another; lower > 0."""
    quniform: list[float] | None = None
    """[lower, upper, q]: lower, lower + q, lower + 2q, ... up to upper."""
    randint: list[int] | None = None
    """[lower, upper]: whole numbers, upper left out as in Ray Tune."""
    lograndint: list[int] | None = None
    """[lower, upper]: whole numbers on a logarithmic scale, upper left out; lower > 0."""
    when: dict[str, list[Any]] = Field(default_factory=dict)
    """Other searched keys with the value, or list of values, under which this one applies: `{train.optim: sgd}`."""

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """The list of choices, or the bounds."""
        return list(getattr(self, self.kind))

    @field_validator("when", mode="before", json_schema_input_type=dict[str, Any])
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {path: item if isinstance(item, list) else [item] for path, item in value.items()}

    @model_serializer(mode="wrap")
    def _without_empty_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value not in (None, {})}

    @model_validator(mode="after")
    def _one_kind_that_holds_something(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}" + (f", not {' and '.join(given)}" if given else ""))
        kind, values = self.kind, self.values
        if kind in ("choice", "grid_search"):
            if not values:
                raise ValueError(f"{kind} is empty")
            return self
        if len(values) != (3 if kind == "quniform" else 2):
            raise ValueError(f"{kind} takes [lower, upper{', q' if kind == 'quniform' else ''}]")
        lower, upper = values[:2]
        if lower >= upper:
            raise ValueError(f"the range is {'empty' if lower == upper else 'reversed'}: lower {lower}, upper {upper}")
        if kind.startswith("log") and lower <= 0:
            raise ValueError(f"a logarithmic scale begins above 0, and lower is {lower}")
        if kind == "quniform" and not 0 < values[2] <= upper - lower:
            raise ValueError(f"q lies above 0 and within the range, and it is {values[2]}")
        return self


class SchedulerArgs(Section):
    """Arguments of the scheduler, with Ray Tune's names."""

    time_attr: Literal["step", "tokens", "training_iteration"] = "step"
    """What a trial's age is counted in: optimiser steps, trained tokens, or evaluations."""
    max_t: float | None = Field(None, gt=0)
    """Age at which a trial has had its full budget. Default: the steps that the recipe has without a sweep."""
    grace_period: float | None = Field(None, gt=0)
    """Age before which no trial is stopped. Default: max_t / reduction_factor^2."""
    reduction_factor: float = Field(3, gt=1)
    """One of so many trials goes on at a rung; the next rung lies so many times later."""
    brackets: int | None = Field(None, ge=1)
    """Brackets with their own first rung. Default: 1 for asha, 3 for hyperband."""
    min_samples_required: int = Field(3, ge=1)
    """median: other trials that must have come as far before one is stopped."""
    perturbation_interval: int | None = Field(None, ge=1)
    """pbt: optimiser steps between two looks at a trial. Default: a tenth of its steps."""
    quantile_fraction: float = Field(0.25, gt=0, le=0.5)
    """pbt: so many of the best are cloned by as many of the worst."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """pbt: how often a cloned value is drawn anew instead of being multiplied by a factor."""
    perturbation_factors: list[float] = Field([1.2, 0.8], min_length=1)
    """pbt: a cloned number is multiplied by one of them."""


class Tune(Section):
    space: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted recipe path -> distribution, such as `adapter.rank: {choice: [4, 8, 16]}`; a plain value is fixed.
    Absent: learning rate, rank, target modules and dropout around the prior of "LoRA Without Regret"."""
    num_samples: int = Field(16, ge=1)
    """Trials. `search_alg: grid` takes every point of the grid instead."""
    metric: str = "validation_loss"
    """What is compared: a scalar of the evaluation, or trainable_parameters, tokens_per_second, peak_memory_gb."""
    mode: Mode = "min"
    """Whether `metric` is to be small or large."""
    metrics: list[str] = Field(default_factory=list)
    """Several objectives instead of `metric`; trials run to their end and the report shows the Pareto front."""
    modes: list[Mode] = Field(default_factory=list)
    """`mode` of each of `metrics`. Default: min."""
    search_alg: Literal["tpe", "gp", "cmaes", "nsga2", "qmc", "random", "grid"] = "tpe"
    """Optuna's sampler: TPE, Gaussian process, CMA-ES, NSGA-II, quasi Monte Carlo, random, or every point of a grid."""
    scheduler: Literal["asha", "hyperband", "median", "none", "pbt"] = "asha"
    """Ray Tune's early stopping: asynchronous halving with one bracket (asha) or several (hyperband), the median of
    the others, or none. Or population-based training (pbt, classic mode): `num_samples` trials run to their end, and
    weak ones go on with the weights of strong ones and other rates."""
    scheduler_args: SchedulerArgs = SchedulerArgs()
    execution: Literal["auto", "pack", "classic"] = "auto"
    """pack: many adapters in one step on one base. classic: each trial a training run of its own. `auto` packs where
    the recipe allows it, and says why not where it does not."""
    pack_size: int | Literal["auto"] = "auto"
    """Adapters that train at once in a pack; `auto` grows it while throughput gains 5% and memory lasts."""
    lanes: int | Literal["auto"] = "auto"
    """Packs, or classic trials, side by side; `auto`: one per GPU, or one on a cluster of CPUs (classic: what fits)."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """At most this many trials at once over all lanes."""
    time_budget_s: float | None = Field(None, gt=0)
    """Seconds, from each start, after which no trial begins and running ones stop at their next evaluation."""
    points_to_evaluate: list[dict[str, Any]] = Field(default_factory=list)
    """Points of the space to try first; keys that are left out are proposed."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Of the proposals. Default: the recipe's `seed`."""
    study_storage: str | None = None
    """Optuna storage: null for a journal file in the run's folder, or a URL such as postgresql://host/db."""
    constraints: dict[str, float] = Field(default_factory=dict)
    """Upper bounds of peak_memory_gb, trainable_parameters or any scalar of the evaluation: trials above count as
    infeasible."""
    repeats: int = Field(0, ge=0)
    """The best three trials are trained again with so many other seeds, for confidence intervals."""

    @property
    def objectives(self) -> list[tuple[str, Mode]]:
        """(metric, mode) of each objective."""
        if not self.metrics:
            return [(self.metric, self.mode)]
        return list(zip(self.metrics, self.modes or ["min"] * len(self.metrics), strict=True))

    @field_validator("space", mode="before", json_schema_input_type=dict[str, Any])
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return _flattened(value) if isinstance(value, Mapping) else value

    @field_validator("space")
    @classmethod
    def _conditions_name_searched_keys(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        ask_order(space)
        return space

    @field_validator("pack_size", "lanes")
    @classmethod
    def _at_least_one(cls, value: object) -> object:
        if isinstance(value, int) and value < 1:
            raise ValueError("1 or more, or auto")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.modes and len(self.modes) != len(self.metrics):
            raise ValueError(f"modes has {len(self.modes)} entries and metrics has {len(self.metrics)}")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics names an objective twice")
        grids = [path for path, item in self.space.items() if item.grid_search is not None]
        if grids and self.search_alg != "grid":
            raise ValueError(f"{grids[0]} is a grid_search, which needs search_alg: grid (or write choice)")
        endless = [path for path, item in self.space.items() if item.kind not in ("choice", "grid_search", "quniform")]
        if endless and self.search_alg == "grid":
            raise ValueError(f"a grid has a list of values for each key, and {endless[0]} has a range")
        if self.search_alg == "cmaes" and len(self.metrics) > 1:
            raise ValueError("cmaes has one objective; use tpe, gp, nsga2 or random with metrics")
        ages = self.scheduler_args
        if self.scheduler == "pbt":
            self._is_a_population()
        if ages.grace_period and ages.max_t and ages.grace_period > ages.max_t:
            raise ValueError("scheduler_args.grace_period lies above scheduler_args.max_t")
        return self

    def _is_a_population(self) -> None:
        if len(self.metrics) > 1:
            raise ValueError("pbt compares by one metric; several metrics need scheduler: none")
        if self.scheduler_args.time_attr != "step":
            raise ValueError("pbt counts in optimiser steps: leave scheduler_args.time_attr at step")
        if self.num_samples < 2:
            raise ValueError("pbt is a population of num_samples trials, and 1 is none")
        if self.repeats:
            raise ValueError("what pbt finds is a schedule, not one recipe, so repeats cannot train it again")


def ask_order(space: Mapping[str, Distribution]) -> list[str]:
    """The paths of a space, each after those that its conditions name.

    Raises ValueError for a condition on a key that is not searched, or conditions that go round in a circle.
    """
    order: list[str] = []
    waiting = list(space)
    for path, item in space.items():
        for other in item.when:
            if other not in space:
                raise ValueError(f"{path} applies when {other} has a value, and {other} is not in the space")
    while waiting:
        ready = [path for path in waiting if all(other in order for other in space[path].when)]
        if not ready:
            raise ValueError(f"the conditions of {' and '.join(waiting)} go round in a circle")
        order.append(ready[0])
        waiting.remove(ready[0])
    return order


def _flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{adapter: {rank: {choice: ...}}}`, as overrides write it, like `{adapter.rank: {choice: ...}}`; plain values
    as the only choice."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Distribution) or (isinstance(item, Mapping) and _describes(item)):
            flat[path] = item
        elif isinstance(item, Mapping):
            flat |= _flattened(item, f"{path}.")
        elif isinstance(item, list):
            raise ValueError(f"{path} is a list; write {path}: {{choice: [...]}}")
        else:
            flat[path] = {"choice": [item]}
    return flat


def _describes(item: Mapping[str, Any]) -> bool:
    """Whether a mapping is a distribution, perhaps a misspelt one, and not a section with keys below it."""
    if not item or any(name in Distribution.model_fields for name in item):
        return True
    return all(isinstance(value, list) for value in item.values())
