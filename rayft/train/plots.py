"""Pictures of a run: its loss curve, and two curves of the same recipe laid on each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayft.train import style
from rayft.train.recorder import Event, Row
from rayft.train.style import BLUE, CURVES, GREEN, GREY, ORANGE, PURPLE, RED


def plot_run(rows: Sequence[Row], events: Sequence[Event], path: str | Path, title: str = "") -> None:
    """Write a PNG: loss (raw and smoothed) with validation points and restarts; gradient norm and learning rate below.

    A panel is left out where no row has its scalar. Works with the rows of any stage of a run, also with none.
    """
    lower = [name for name in ("grad_norm", "learning_rate") if _series(rows, name)[0]]
    figure = style.canvas(4.2 + 1.4 * len(lower))
    panels = figure.subplots(1 + len(lower), 1, sharex=True, squeeze=False, height_ratios=[4.2] + [1.4] * len(lower))
    top, *rest = (row[0] for row in panels)
    _loss(top, rows)
    labels = {"grad_norm": ("gradient norm", PURPLE), "learning_rate": ("learning rate", GREEN)}
    for axes, name in zip(rest, lower, strict=True):
        label, colour = labels[name]
        axes.plot(*_series(rows, name), color=colour, linewidth=1.2)
        axes.set_ylabel(label)
        if name == "learning_rate":
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        else:
            axes.set_ylim(bottom=0)
            style.cap(axes, _series(rows, name)[1])
    for axes in (top, *rest):
        style.frame(axes)
    _restarts([top, *rest], events)
    style.legend(top)
    _finish(figure, [top, *rest][-1], title, path)


def plot_compare(
    curves: Mapping[str, Sequence[Row]], events: Sequence[Event], path: str | Path, title: str = ""
) -> float:
    """Write a PNG with several training-loss curves and, below, how far each is from the first one.

    `curves`: label -> rows; `events` are those of the disturbed runs, whose restarts are marked. Returns the largest
    absolute difference at a step that the first curve and another one share (0 with a single curve).
    """
    figure = style.canvas(5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    first, *others = curves
    # Equal curves hide each other: the first is wide and pale, the others are dashes on top of it that take turns.
    top.plot(*_series(curves[first], "loss"), color=BLUE, linewidth=5, alpha=0.35, label=first, solid_capstyle="round")
    reference = dict(zip(*_series(curves[first], "loss"), strict=True))
    largest, compared = 0.0, False
    for number, label in enumerate(others):
        colour = _dark(CURVES[1 + number % (len(CURVES) - 1)])
        dashes = (4 * number, (4, max(2, 4 * (len(others) - 1))))
        steps, losses = _series(curves[label], "loss")
        top.plot(steps, losses, color=colour, linewidth=1.5, linestyle=dashes, label=label)
        shared = [(step, loss - reference[step]) for step, loss in zip(steps, losses, strict=True) if step in reference]
        if shared:
            bottom.plot(*zip(*shared, strict=True), color=colour, linewidth=1.4, linestyle=dashes)
            compared = True
            largest = max(largest, *(abs(difference) for _, difference in shared))
    top.set_ylabel("training loss")
    bottom.set_ylabel("difference")
    bottom.axhline(0, color=GREY, linewidth=0.8)
    room = 1.3 * largest or 1e-6
    bottom.set_ylim(-room, room)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    verdict = f"largest difference {largest:.2g}" if largest else "identical at every step" if compared else ""
    bottom.set_title(verdict, fontsize=9, color=GREY, loc="right", pad=4)
    for axes in (top, bottom):
        style.frame(axes)
    _restarts([top, bottom], events)
    style.legend(top)
    _finish(figure, bottom, title, path)
    return largest


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Gaussian mean around each value, `width` steps wide (standard deviation); no lag, as an average of the past has.

    Each value is first replaced by the median of itself and its two neighbours, so that a single spike leaves no hump.
    """
    if len(values) < 3 or width <= 0:
        return list(values)
    calm = np.array([values[0], *np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0), values[-1]])
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    middle = slice(reach, reach + len(calm))
    return list(np.convolve(calm, kernel)[middle] / np.convolve(np.ones(len(calm)), kernel)[middle])


def _loss(axes: Axes, rows: Sequence[Row]) -> None:
    steps, losses = _series(rows, "loss")
    if losses:
        axes.plot(steps, losses, color=BLUE, alpha=0.28, linewidth=1)
        axes.plot(steps, smooth(losses, len(losses) / 80), color=BLUE, linewidth=2, label="training loss (smoothed)")
    at, validation = _series(rows, "validation_loss")
    if validation:
        axes.plot(at, validation, color=ORANGE, linewidth=1.4, marker="o", markersize=6, label="validation loss")
        best = min(range(len(validation)), key=validation.__getitem__)
        style.star(axes, at[best], validation[best], f"best {validation[best]:.4g} (step {at[best]})")
    style.cap(axes, losses + validation)
    axes.set_ylabel("loss")
    if not losses and not validation:
        style.empty(axes, "nothing logged")


def _restarts(panels: Sequence[Axes], events: Sequence[Event]) -> None:
    """A vertical line at each step from which a run was restarted; the legend counts them."""
    steps = [event["step"] for event in events if event["kind"] == "restart"]
    label: str | None = "restart" if len(steps) == 1 else f"{len(steps)} restarts"
    for step in sorted(set(steps)):
        for axes in panels:
            axes.axvline(step, color=RED, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1, label=label)
            label = None


def _finish(figure: Figure, lowest: Axes, title: str, path: str | Path) -> None:
    lowest.set_xlabel("optimiser step")
    style.whole_numbers(lowest)
    style.save(figure, title, path)


def _series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one scalar, without the gaps."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [float(value) for _, value in found]


def _dark(colour: str) -> str:
    """Three quarters as bright, for thin lines on top of a pale wide one."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{int(0.75 * part):02x}" for part in parts)
