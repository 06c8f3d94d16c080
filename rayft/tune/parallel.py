"""One line per trial through its parameters to its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from rayft.train import style
from rayft.train.style import GREY, INK, ORANGE
from rayft.tune.objective import Objective, ranking
from rayft.tune.plots import PRUNED, spans_decades
from rayft.tune.rows import TrialRow
from rayft.tune.words import labels, paths_of, shown

BLUES = LinearSegmentedColormap.from_list("blues", ["#08407A", "#3F8FCB", "#C3DDF0"])
ABSENT = -0.13
"""Height of the trials to which a conditional parameter does not apply."""
MOST_CHOICES = 12
MOST_AXES = 9


@dataclass(frozen=True)
class Scale:
    """One vertical axis: heights 0 to 1."""

    name: str
    ticks: tuple[tuple[float, str], ...]
    places: tuple[Any, ...] = ()
    """Of a categorical one: its choices as text, from the bottom up."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    def height(self, value: Any) -> float:
        if self.places:
            return _spread(self.places.index(shown(value)), len(self.places))
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


def plot_parallel(
    rows: Sequence[TrialRow],
    objective: Objective,
    distributions: Mapping[str, BaseDistribution],
    path: str | Path,
    title: str = "",
) -> None:
    """Write a PNG: parallel coordinates of the parameters that vary, the darker the better; pruned trials are grey and
    end before the last axis, since their value belongs to an earlier step."""
    complete = ranking(rows, [objective])
    pruned = [row for row in rows if row.state == "pruned"]
    paths = paths_of([*complete, *pruned])[:MOST_AXES]
    short = labels(paths)
    scales = {name: _scale(short[name], [*complete, *pruned], name, distributions.get(name)) for name in paths}
    results = [objective.of(row) or 0.0 for row in complete]
    figure = style.canvas(4.8)
    axes = figure.subplots()
    axes.axis("off")
    if not paths:
        style.empty(axes, "no trial has ended with a result")
    for row in pruned:
        _line(axes, row, scales, [], PRUNED, width=0.8, alpha=0.6)
    if results:
        scale = _numeric(objective.metric, min(results), max(results), log=spans_decades(results))
        for place, row in reversed(list(enumerate(complete))):
            colour = ORANGE if place == 0 else to_hex(BLUES(place / max(1, len(complete) - 1)))
            end = [scale.height(results[place])]
            _line(axes, row, scales, end, colour, width=2.6 if place == 0 else 1.3, alpha=1.0 if place == 0 else 0.8)
        _axis(axes, len(paths), scale, bold=True)
    for at, (name, scale) in enumerate(scales.items()):
        _axis(axes, at, scale, absent=any(name not in row.values for row in (*complete, *pruned)))
    if complete:
        axes.plot([], [], color=ORANGE, linewidth=2.6, label=f"best (trial {complete[0].number})")
        axes.plot([], [], color=BLUES(0.3), linewidth=1.3, label="complete, the darker the better")
    if pruned:
        axes.plot([], [], color=PRUNED, linewidth=1, label="pruned")
    axes.set_xlim(-0.15, len(paths) + 0.45)
    axes.set_ylim(-0.2, 1.16)
    style.legend(axes)
    style.save(figure, title, path)


def _line(
    axes: Axes, row: TrialRow, scales: Mapping[str, Scale], end: list[float], colour: str, *, width: float, alpha: float
) -> None:
    heights = [
        # Equal choices would hide each other: each trial keeps its own small distance.
        (scale.height(row.values[path]) + (0.02 * math.sin(row.number) if scale.places else 0.0))
        if path in row.values
        else ABSENT
        for path, scale in scales.items()
    ]
    axes.plot(range(len(heights + end)), heights + end, color=colour, linewidth=width, alpha=alpha, zorder=3)


def _axis(axes: Axes, at: int, scale: Scale, *, absent: bool = False, bold: bool = False) -> None:
    axes.plot([at, at], [0, 1], color=GREY, linewidth=1, zorder=4)
    weight = "bold" if bold else "normal"
    axes.text(at, 1.06, scale.name.replace("_", "\n", 1) if len(scale.name) > 10 else scale.name,
              ha="center", va="bottom", fontsize=9.5, color=INK, fontweight=weight)  # fmt: skip
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    ticks = [*scale.ticks, *([(ABSENT, "not used")] if absent else [])]
    for height, text in ticks:
        axes.plot([at - 0.02, at + 0.02], [height, height], color=GREY, linewidth=1, zorder=4)
        axes.text(at + 0.05, height, text, va="center", fontsize=8.5, color=INK, bbox=box, zorder=5)


def _scale(name: str, rows: Sequence[TrialRow], path: str, distribution: BaseDistribution | None) -> Scale:
    values = [row.values[path] for row in rows if path in row.values]
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return _numeric(name, min(values), max(values), log=distribution.log)
    choices = {shown(value): value for value in values}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers and len(choices) > MOST_CHOICES:
        return _numeric(name, min(values), max(values), log=spans_decades(values))
    places = tuple(sorted(choices, key=choices.__getitem__) if numbers else sorted(choices))
    return Scale(name, tuple((_spread(at, len(places)), _short(text)) for at, text in enumerate(places)), places)


def _numeric(name: str, low: float, high: float, *, log: bool) -> Scale:
    bare = Scale(name, (), low=low, high=high, log=log)
    if low == high:
        return Scale(name, ((0.5, shown(low)),), low=low, high=high, log=log)
    if log:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        at = [10.0**decade for decade in decades]
        at = at if len(at) > 1 else [low, *at, high]
    else:
        at = [tick for tick in MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
    return Scale(name, tuple((bare.height(tick), shown(float(tick))) for tick in at), (), low, high, log)


def _spread(at: int, count: int) -> float:
    return at / (count - 1) if count > 1 else 0.5


def _short(text: str) -> str:
    return text if len(text) <= 14 else f"{text[:13]}…"
