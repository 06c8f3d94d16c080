"""The space of a sweep: what is drawn for each recipe path, and points of it as recipes."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayft import config
from rayft.config.keys import Part, exists
from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved
from rayft.config.tune import Distribution, ask_order
from rayft.config.validate import advice
from rayft.errors import UsageError
from rayft.runtime.package import user_values

if TYPE_CHECKING:
    import optuna

DRAWS = 64
"""Random points by which a space is judged before anything starts."""

FIXED = {
    "name": "it identifies the run",
    "storage": "it identifies the run",
    "tune": "it is the sweep itself",
    "federate": "a trial is a training run",
    "serve": "a trial is a training run",
    "scale": "it changes where a trial computes, not what",
    "data.validation": "trials are compared on the same held-out examples",
}
"""Paths that cannot be searched, and why."""

MEASURED_ALONG = ("model.base", "data.train_on", "data.prompt_loss_weight", "data.max_length", "data.chat_template")
"""Paths that change what the validation loss measures, not only how low it is."""

logger = logging.getLogger(__name__)

Values = dict[str, Any]
"""Recipe path -> value as the recipe has it; conditional paths that do not apply are absent."""


@dataclass(frozen=True)
class Space:
    """base: what the user decided, as plain data; distributions: in the order in which they are asked."""

    base: Mapping[str, Any]
    distributions: Mapping[str, Distribution]

    @classmethod
    def of(cls, resolved: Resolved, distributions: Mapping[str, Distribution] | None = None) -> Space:
        """The space of a recipe's section `tune`, or another one around the same recipe."""
        tune = resolved.recipe.tune
        chosen = distributions if distributions is not None else tune.space if tune else {}
        base = {key: value for key, value in user_values(resolved).items() if key != "tune"}
        return cls(base, {path: chosen[path] for path in ask_order(chosen)})

    # Points

    def ask(self, trial: optuna.Trial) -> Values:
        """The next point, proposed by Optuna. A single choice is not asked for."""
        return self._walk(lambda path, item: self._suggest(trial, path, item))

    def draw(self, rng: random.Random, given: Mapping[str, Any] | None = None) -> Values:
        """A random point, with some values given."""
        given = given or {}
        return self._walk(lambda path, item: given[path] if path in given else _drawn(rng, item))

    def grid(self) -> list[Values]:
        """Every point of a space of lists, in the order of the lists, each once."""
        finite = {path: _listed(item) for path, item in self.distributions.items()}
        points = (dict(zip(finite, chosen, strict=True)) for chosen in itertools.product(*finite.values()))
        unique = {json.dumps(point): point for point in (self._walk(lambda path, _: full[path]) for full in points)}  # noqa: B023
        return list(unique.values())

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The resolved recipe of a point, without its section `tune`. Raises UsageError where it is not valid."""
        plain = copy.deepcopy(dict(self.base))
        for path in sorted(values, key=lambda path: path.count(".")):  # a section before the keys inside of it
            _set(plain, parts_of(path), copy.deepcopy(values[path]))
        return config.load(plain).recipe

    def invalid(self, values: Values) -> str | None:
        """Why a point is no valid recipe; None when it is one."""
        try:
            self.recipe(values)
        except UsageError as error:
            return error.message
        return None

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A point as Optuna's parameters: lists and mappings as JSON text, single choices left out."""
        return {
            path: _encoded(value) if self.distributions[path].kind in ("choice", "grid_search") else value
            for path, value in values.items()
            if not _is_single(self.distributions[path])
        }

    def decode(self, parameters: Mapping[str, Any]) -> Values:
        """The inverse of `encode`."""
        return self._walk(lambda path, item: _decoded(item, parameters[path]), known=parameters)

    def _walk(self, value_of: Callable[[str, Distribution], Any], known: Mapping[str, Any] | None = None) -> Values:
        """The values of all paths that apply, parents first; with `known`, of those that stand there."""
        values: Values = {}
        for path, item in self.distributions.items():
            if all(other in values and values[other] in allowed for other, allowed in item.when.items()):
                if _is_single(item):
                    values[path] = item.values[0]
                elif known is None or path in known:
                    values[path] = value_of(path, item)
        return values

    @staticmethod
    def _suggest(trial: optuna.Trial, path: str, item: Distribution) -> Any:
        match item.kind:
            case "choice" | "grid_search":
                return _decoded(item, trial.suggest_categorical(path, [_encoded(value) for value in item.values]))
            case "uniform" | "loguniform":
                return trial.suggest_float(path, *item.values, log=item.kind == "loguniform")
            case "quniform":
                lower, upper, step = item.values
                return _rounded(trial.suggest_float(path, lower, upper, step=step), item)
            case _:
                lower, upper = item.values
                return trial.suggest_int(path, lower, upper - 1, log=item.kind == "lograndint")

    # Checks

    def check(self, points: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raises UsageError: R720 a path that no recipe has or that cannot be searched, R721 a choice, or the whole
        space, whose every point is invalid, R722 one of `points` (`points_to_evaluate`) that is not of the space."""
        for path in self.distributions:
            self._check_path(path)
        for number, point in enumerate(points):
            self._check_point(number, point)
        if self.distributions:
            self._check_choices()
        blurred = [path for path in self.distributions if path.startswith(MEASURED_ALONG)]
        if blurred:
            logger.warning("%s changes what the validation loss measures: compare trials with care", blurred[0])

    def _check_path(self, path: str) -> None:
        parts = parts_of(path)
        for fixed, why in FIXED.items():
            if path == fixed or path.startswith(f"{fixed}."):
                raise UsageError("R720", f"tune.space: {path} cannot be searched: {why}", "take it out of the space")
        if path == "seed" and isinstance(self.base.get("data", {}).get("validation"), float):
            why = "it also draws the held-out examples, and trials are compared on the same ones"
            raise UsageError("R720", f"tune.space: seed cannot be searched: {why}", "give data.validation a file")
        if not exists(parts):
            raise UsageError("R720", f"tune.space: no recipe has a key {path}. {advice(tuple(parts))}")
        if len(parts) > 3 and parts[0] == "data" and len(self.base["data"]["train"]) <= int(parts[2]):
            raise UsageError("R720", f"tune.space: {path}: data.train has {len(self.base['data']['train'])} sources")

    def _check_point(self, number: int, point: Mapping[str, Any]) -> None:
        where = f"tune.points_to_evaluate.{number}"
        for path, value in point.items():
            item = self.distributions.get(path)
            if item is None:
                raise UsageError(
                    "R722", f"{where}: {path} is not in the space", f"searched: {', '.join(self.distributions)}"
                )
            if not _contains(item, value):
                raise UsageError("R722", f"{where}: {path} is {value!r}, which is not in {item.kind} {item.values}")
        reasons = [self.invalid(self.draw(random.Random(seed), point)) for seed in range(8)]
        if all(reasons):
            raise UsageError("R722", f"{where} is not a valid recipe: {reasons[0]}")

    def _check_choices(self) -> None:
        rng = random.Random(0)
        points = [self.draw(rng) for _ in range(DRAWS)]
        reasons = [self.invalid(point) for point in points]
        if all(reasons):
            raise UsageError("R721", f"tune.space: all of {DRAWS} points tried are invalid; the first: {reasons[0]}")
        for path, item in self.distributions.items():
            for choice in item.values if item.kind in ("choice", "grid_search") else []:
                of_choice = [why for point, why in zip(points, reasons, strict=True) if _has(point, path, choice)]
                if of_choice and all(of_choice):
                    more = [self.invalid(self.draw(rng, {path: choice})) for _ in range(DRAWS // 4)]
                    if all(more):
                        raise UsageError("R721", f"tune.space: {path}={choice!r} is never valid: {of_choice[0]}")


def parts_of(path: str) -> list[Part]:
    """The parts of a dotted path; indices of lists as numbers."""
    return [int(part) if part.isdigit() else part for part in path.split(".")]


def _set(node: Any, parts: Sequence[Part], value: Any) -> None:
    for part in parts[:-1]:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[parts[-1]] = value


def _has(values: Mapping[str, Any], path: str, value: Any) -> bool:
    return path in values and _encoded(values[path]) == _encoded(value)


def _encoded(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _decoded(item: Distribution, parameter: Any) -> Any:
    if item.kind in ("choice", "grid_search"):
        return next(value for value in item.values if _encoded(value) == parameter)
    return _rounded(parameter, item)


def _rounded(value: float, item: Distribution) -> Any:
    """A step of whole numbers gives whole numbers, which keys that count something insist on."""
    whole = item.kind == "quniform" and all(float(bound).is_integer() for bound in item.values)
    return round(value) if whole else value


def _is_single(item: Distribution) -> bool:
    return item.kind in ("choice", "grid_search") and len(item.values) == 1


def _listed(item: Distribution) -> list[Any]:
    if item.kind != "quniform":
        return item.values
    lower, upper, step = item.values
    return [_rounded(lower + step * k, item) for k in range(math.floor((upper - lower) / step + 1e-9) + 1)]


def _drawn(rng: random.Random, item: Distribution) -> Any:
    if item.kind in ("choice", "grid_search", "quniform"):
        return rng.choice(_listed(item))
    lower, upper = item.values
    if item.kind.endswith("randint"):
        return rng.randrange(lower, upper)
    if item.kind == "loguniform":
        return math.exp(rng.uniform(math.log(lower), math.log(upper)))
    return rng.uniform(lower, upper)


def _contains(item: Distribution, value: Any) -> bool:
    if item.kind in ("choice", "grid_search"):
        return any(_encoded(value) == _encoded(choice) for choice in item.values)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    lower, upper = item.values[:2]
    return lower <= value < upper if item.kind.endswith("randint") else lower <= value <= upper


def nearest(item: Distribution, value: Any) -> Any:
    """The value of a distribution that lies next to a number; choices stay as they are."""
    if item.kind in ("choice", "grid_search"):
        return value
    lower, upper = item.values[:2]
    if item.kind == "quniform":
        return min(_listed(item), key=lambda step: abs(step - value))
    return min(max(value, lower), upper - 1 if item.kind.endswith("randint") else upper)


def described(space: Space) -> Iterator[tuple[str, str]]:
    """(path, distribution in one line), for people."""
    for path, item in space.distributions.items():
        when = "".join(f", when {other} is {' or '.join(map(str, values))}" for other, values in item.when.items())
        yield path, f"{item.kind} {item.values}{when}"
