"""How rayft's pictures look: colours, axes, legend and file, shared by all that draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
"""Okabe and Ito's colours, told apart with every kind of colour blindness."""
CURVES = (BLUE, ORANGE, GREEN, PURPLE)
INK, GREY, PALE = "#222222", "#6B6B6B", "#E3E3E3"
WIDTH, DPI = 9.0, 150


def canvas(height: float) -> Figure:
    """An empty figure of the common width; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes) -> None:
    """Quiet axes with a horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9.5)
    axes.xaxis.label.set(color=INK, fontsize=10.5)
    axes.yaxis.label.set(color=INK, fontsize=10.5)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)


def whole_numbers(axes: Axes) -> None:
    """Round integers on the horizontal axis, as steps and trials are counted."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def star(axes: Axes, x: float, y: float, label: str) -> None:
    """Mark the best point."""
    look: dict[str, Any] = {"marker": "*", "markersize": 17, "markeredgewidth": 0.8, "linestyle": "none"}
    axes.plot(x, y, color=ORANGE, markeredgecolor=INK, label=label, zorder=5, **look)


def cap(axes: Axes, values: Sequence[float]) -> None:
    """Cut off rare spikes that would flatten the rest of the curve; the axis says so by an arrow at its end."""
    if len(values) < 20:
        return
    ordered = sorted(values)
    usual = ordered[math.ceil(0.98 * len(ordered)) - 1]
    if ordered[-1] > 4 * usual > 0:
        axes.set_ylim(min(0.0, ordered[0]), 1.3 * usual)
        text = f"↑ up to {ordered[-1]:.3g}"
        axes.text(0.995, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=9, color=GREY)


def empty(axes: Axes, text: str) -> None:
    """Say in the middle of a panel why nothing is in it."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def legend(axes: Axes) -> None:
    """Above the panel, where it cannot cover a curve."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=4,
            fontsize=10,
            borderaxespad=0.2,
            handletextpad=0.6,
            columnspacing=1.8,
        )


def save(figure: Figure, title: str, path: str | Path) -> None:
    figure.align_ylabels()
    if title:
        figure.suptitle(title, fontsize=12.5, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.savefig(path, facecolor="white", format="png")
