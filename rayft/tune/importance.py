"""Which parameters decided whether a trial was among the best ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rayft.tune.objective import Objective, costs, standing
from rayft.tune.rows import TrialRow
from rayft.tune.words import shown

LEAST_TRIALS = 8
"""With fewer ended trials the answer is noise."""


def importance(
    rows: Sequence[TrialRow], objectives: Sequence[Objective], distributions: Mapping[str, BaseDistribution]
) -> dict[str, float]:
    """Recipe path -> share (they add up to 1), the largest first, by PED-ANOVA (Watanabe et al., arXiv:2304.10255).

    How much a parameter's values among the best trials (a tenth of them, at least five, at most half) differ from its
    values among all. With one objective pruned trials take part, behind the complete ones; with several the best are
    those nearest to the Pareto front. Empty with fewer than LEAST_TRIALS such trials, and where no parameter varies.
    """
    if len(objectives) == 1:
        # PED-ANOVA looks at the order only, and no value of a pruned trial can be compared with a complete one's.
        ended = standing(rows, objectives[0])
        scores: list[tuple[float, ...]] = [(float(place),) for place in range(len(ended))]
    else:
        known = [(cost, row) for row in rows if row.state == "complete" if (cost := costs(row, objectives)) is not None]
        ended, scores = [row for _, row in known], [cost for cost, _ in known]
    spaces = {}
    for path, distribution in distributions.items():
        seen = [row.values[path] for row in ended if path in row.values]
        if seen and not (space := _space(seen, distribution)).single():
            spaces[path] = space
    if len(ended) < LEAST_TRIALS or not spaces:
        return {}
    with _quiet():
        study = optuna.create_study(directions=["minimize"] * len(objectives))
        for row, score in zip(ended, scores, strict=True):
            used = {path: space for path, space in spaces.items() if path in row.values}
            values = {path: _value(row.values[path], space) for path, space in used.items()}
            study.add_trial(optuna.trial.create_trial(values=list(score), params=values, distributions=used))
        best = max(0.1, min(0.5, 5 / len(ended)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)
        found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found


def _space(values: Sequence[Any], distribution: BaseDistribution) -> BaseDistribution:
    """The distribution over what the trials have: a point that the user proposed may lie outside the space, and a
    choice may be a list, which Optuna does not take."""
    if isinstance(distribution, FloatDistribution | IntDistribution):
        low, high = min(distribution.low, *values), max(distribution.high, *values)
        if (low, high) == (distribution.low, distribution.high):
            return distribution
        return type(distribution)(low, high, log=distribution.log)
    return CategoricalDistribution(sorted({shown(value) for value in values}))


def _value(value: Any, space: BaseDistribution) -> Any:
    return shown(value) if isinstance(space, CategoricalDistribution) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's word about each study, and its warnings about few trials, which the pictures say themselves."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
