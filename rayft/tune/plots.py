"""Pictures of a sweep: its history, the trials' curves, what mattered, and what was traded against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from rayft.train import style
from rayft.train.style import BLUE, GREY, INK, ORANGE, RED
from rayft.tune.objective import Objective, finite, ranking, winners
from rayft.tune.rows import TrialRow

PRUNED = "#B9B9B9"
FILLS = {"complete": BLUE, "pruned": PRUNED, "failed": RED}
MOST_PANELS = 3


def plot_history(rows: Sequence[TrialRow], objectives: Sequence[Objective], path: str | Path, title: str = "") -> None:
    """Write a PNG: the result of each complete trial and the best so far; below, how much of its budget each trial
    used. Values of pruned trials belong to earlier steps and are left out."""
    shown = objectives[:MOST_PANELS]
    figure = style.canvas(1.9 + 2.6 * len(shown))
    *panels, lowest = figure.subplots(
        len(shown) + 1, 1, sharex=True, squeeze=False, height_ratios=[2.6] * len(shown) + [1.1]
    )[:, 0]
    complete = [row for row in rows if row.state == "complete"]
    last = max([row.number for row in rows], default=0)
    for axes, objective in zip(panels, shown, strict=True):
        points = [(row.number, value) for row in complete if (value := objective.of(row)) is not None]
        _results(axes, points, objective, star=len(objectives) == 1, end=last)
        axes.set_ylabel(objective.metric.replace("_", " "))
    for state, colour in FILLS.items():
        ended = [row for row in rows if row.state == state]
        if ended:
            shares = [100 * row.step / row.total_steps if row.total_steps else 0.0 for row in ended]
            # A trial that failed at once must still be seen.
            lowest.bar([row.number for row in ended], [max(1.5, share) for share in shares], color=colour, label=state)
    lowest.set_ylabel("% of budget")
    lowest.set_ylim(0, 100)
    for axes in (*panels, lowest):
        style.frame(axes)
    style.legend(panels[0])
    style.legend(lowest)
    lowest.set_xlim(-0.7, max(last, 5) + 0.7)
    lowest.set_xlabel("trial")
    style.whole_numbers(lowest)
    style.save(figure, title, path)


def plot_curves(
    rows: Sequence[TrialRow], objective: Objective, path: str | Path, title: str = "", rungs: Sequence[float] = ()
) -> None:
    """Write a PNG: the objective of each trial at its evaluations. `rungs`: steps at which trials were stopped."""
    figure = style.canvas(4.4)
    axes = figure.subplots()
    best = {row.number for row in winners(rows, [objective])}
    told: set[str] = set()
    values: list[float] = []
    for row in sorted(rows, key=lambda row: row.number in best):
        points = [(step, value) for step, value in row.history if finite(value) is not None]
        if not points:
            continue
        values += [value for _, value in points]
        steps, losses = zip(*points, strict=True)
        name = f"best (trial {row.number})" if row.number in best else row.state
        colour = ORANGE if row.number in best else FILLS.get(row.state, INK)
        wide, alpha = (2.4, 1.0) if row.number in best else (1.1, 0.9 if row.state == "failed" else 0.55)
        axes.plot(steps, losses, color=colour, linewidth=wide, alpha=alpha, label=None if name in told else name)
        end = {"pruned": "o", "failed": "X"}.get(row.state, ".")
        axes.plot(steps[-1], losses[-1], color=colour, marker=end, markersize=6 if end == "X" else 4, linestyle="none")
        told.add(name)
    style.frame(axes)
    if not values:
        style.empty(axes, "no trial was evaluated")
    for number, rung in enumerate(rungs):
        label = "rung" if number == 0 else None
        axes.axvline(rung, color=GREY, linewidth=0.9, linestyle=(0, (2, 3)), zorder=0, label=label)
    style.cap(axes, values)
    style.legend(axes)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(objective.metric.replace("_", " "))
    style.whole_numbers(axes)
    style.save(figure, title, path)


def plot_importance(shares: Mapping[str, float], path: str | Path, title: str = "") -> None:
    """Write a PNG: one bar per recipe path with its share, the largest on top. `shares`: of `importance.importance`."""
    figure = style.canvas(0.9 + 0.42 * max(2, len(shares)))
    axes = figure.subplots()
    ordered = sorted(shares.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=BLUE, height=0.62)
    axes.bar_label(
        bars,
        labels=[f"{share:.0%}" if share >= 0.01 else "<1%" for _, share in ordered],
        padding=4,
        color=INK,
        fontsize=9.5,
    )
    style.frame(axes)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, 1.08 * max([1e-9, *shares.values()]))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=10)
    if not shares:
        style.empty(axes, "nothing to compare")
    style.save(figure, title, path)


def plot_front(rows: Sequence[TrialRow], objectives: Sequence[Objective], path: str | Path, title: str = "") -> None:
    """Write a PNG: the first objective against each other one, with the Pareto front."""
    others = objectives[1 : 1 + MOST_PANELS]
    figure = style.canvas(4.6)
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    complete, front = ranking(rows, objectives), winners(rows, objectives)
    for axes, other in zip(panels, others, strict=True):
        points = {row.number: (objectives[0].of(row) or 0.0, other.of(row) or 0.0) for row in complete}
        behind = [points[row.number] for row in complete if row not in front]
        best = [points[row.number] for row in front]
        if behind:
            axes.plot(
                *zip(*behind, strict=True), color=BLUE, marker="o", linestyle="none", alpha=0.55, label="complete"
            )
        if best:
            line = ":" if len(objectives) == 2 else "none"
            label = "Pareto front"
            axes.plot(*zip(*best, strict=True), color=ORANGE, linestyle=line, linewidth=1.3, marker="o", markersize=9,
                      markeredgecolor=INK, markeredgewidth=0.8, label=label, zorder=4)  # fmt: skip
        for row in front:
            axes.annotate(
                str(row.number), points[row.number], (6, 6), textcoords="offset points", color=INK, fontsize=9
            )
        style.frame(axes)
        axes.margins(0.06)
        for which, values in (("x", [x for x, _ in points.values()]), ("y", [y for _, y in points.values()])):
            if spans_decades(values):
                getattr(axes, f"set_{which}scale")("log")
        axes.set_xlabel(_with_arrow(objectives[0], "←", "→"))
        axes.set_ylabel(_with_arrow(other, "↓", "↑"))
        if not points:
            style.empty(axes, "no trial is complete")
    style.legend(panels[0])
    style.save(figure, title, path)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows them better."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _results(axes: Axes, points: Sequence[tuple[int, float]], objective: Objective, *, star: bool, end: int) -> None:
    """Each complete trial's value, and the staircase of the best so far."""
    if not points:
        style.empty(axes, "no trial is complete")
        return
    numbers, values = zip(*sorted(points), strict=True)
    axes.plot(numbers, values, color=BLUE, marker="o", markersize=6, alpha=0.75, linestyle="none", label="complete")
    best = [values[0]]
    for value in values[1:]:
        best.append(value if objective.cost(value) < objective.cost(best[-1]) else best[-1])
    axes.step([*numbers, end], [*best, best[-1]], where="post", color=ORANGE, linewidth=2, label="best so far")
    if star:
        at = values.index(best[-1])
        style.star(axes, numbers[at], best[-1], f"best {best[-1]:.4g} (trial {numbers[at]})")
    style.cap(axes, values)


def _with_arrow(objective: Objective, less: str, more: str) -> str:
    """The metric and the direction that is better."""
    return f"{objective.metric.replace('_', ' ')}  ({less if objective.mode == 'min' else more} better)"
