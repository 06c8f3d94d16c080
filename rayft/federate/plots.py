"""Pictures of a federation: losses and gap by round, and who has how much of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from rayft.federate.heterogeneity import Heterogeneity
from rayft.train import style
from rayft.train.style import BLUE, GREY, ORANGE, RED

LOSSES = (
    ("loss", "clients' training loss", GREY),
    ("federated_loss", "clients' held-out loss", BLUE),
    ("federated_worst_decile", "worst tenth of the clients", RED),
    ("validation_loss", "validation loss", ORANGE),
)
MOST_CLIENTS = 60
MOST_CLASSES = 12


def plot_rounds(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Write a PNG: losses of each round; below, what was lost in aggregation and the privacy spent, where there is."""
    below = [key for key in ("gap", "epsilon") if any(row.get(key) is not None for row in rows)]
    figure = style.canvas(3.6 + 1.6 * len(below))
    panels = figure.subplots(1 + len(below), 1, sharex=True, squeeze=False, height_ratios=[3.0] + [1.2] * len(below))
    axes = panels[0, 0]
    for key, label, colour in LOSSES:
        points = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=".", linewidth=1.8, label=label)
    axes.set_ylabel("loss")
    style.frame(axes)
    style.legend(axes)
    for axes, key in zip(panels[1:, 0], below, strict=True):
        points = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True), color=BLUE, marker=".", linewidth=1.6)
        axes.set_ylabel(key)
        if key == "gap" and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        style.frame(axes)
    panels[-1, 0].set_xlabel("round")
    style.whole_numbers(panels[-1, 0])
    style.save(figure, title, path)


def plot_clients(clients: Heterogeneity, path: str | Path, title: str = "") -> None:
    """Write a PNG: examples of each client by class, the first 60 clients and the 12 largest classes."""
    figure = style.canvas(4.2)
    axes = figure.subplots()
    counts = clients.counts[:MOST_CLIENTS]
    order = np.argsort(-clients.counts.sum(axis=0), kind="stable")
    bottom = np.zeros(len(counts))
    palette = colormaps["tab20"]
    for place, number in enumerate(order[:MOST_CLASSES]):
        axes.bar(range(len(counts)), counts[:, number], bottom=bottom, color=palette(place), width=0.8,
                 label=str(clients.classes[number])[:24])  # fmt: skip
        bottom += counts[:, number]
    rest = counts[:, order[MOST_CLASSES:]].sum(axis=1)
    if rest.any():
        axes.bar(range(len(counts)), rest, bottom=bottom, color=GREY, width=0.8, label="others")
    style.frame(axes)
    style.legend(axes)
    axes.set_xlabel("client")
    axes.set_ylabel("examples")
    style.whole_numbers(axes)
    style.save(figure, title, path)
