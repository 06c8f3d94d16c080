"""The pictures of a report: which ones a sweep has, and what to see in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayft.tune.importance import LEAST_TRIALS, importance
from rayft.tune.outcome import Outcome
from rayft.tune.parallel import plot_parallel
from rayft.tune.plots import plot_curves, plot_front, plot_history, plot_importance
from rayft.tune.words import paths_of


@dataclass(frozen=True)
class Picture:
    title: str
    file: str | None
    """Name beside the report; None where there is nothing to draw, which the note explains."""
    note: str


def draw(outcome: Outcome, folder: Path) -> list[Picture]:
    """Write the sweep's PNGs into `folder`, in the order of the report. None before a trial has ended."""
    rows, objectives = outcome.rows, outcome.objectives
    if not any(row.ended for row in rows):
        return []
    pictures = []
    if len(objectives) > 1:
        plot_front(rows, objectives, folder / "front.png", "Pareto front")
        note = "No other trial is better in one objective without being worse in another."
        pictures.append(Picture("Pareto front", "front.png", note))
    plot_history(rows, objectives, folder / "history.png", "History")
    pictures.append(
        Picture("History", "history.png", "Above what came out, below how much of its budget a trial used.")
    )
    if any(row.history for row in rows):
        plot_curves(rows, objectives[0], folder / "curves.png", "Curves", outcome.rungs)
        pictures.append(Picture("Curves", "curves.png", "A grey curve ends where its trial was stopped."))
    shares = importance(rows, objectives, outcome.distributions)
    if shares:
        plot_importance(shares, folder / "importance.png", "Importance of the parameters")
        note = "How much each parameter's values among the best trials differ from those among all (PED-ANOVA)."
        pictures.append(Picture("Importance", "importance.png", note))
    else:
        note = f"Needs at least {LEAST_TRIALS} trials with a result and a parameter that varies."
        pictures.append(Picture("Importance", None, note))
    if paths_of(rows):
        plot_parallel(rows, objectives[0], outcome.distributions, folder / "parallel.png", "Parameters and result")
        note = "One line per trial. Parameters that all trials share are left out."
        pictures.append(Picture("Parameters and result", "parallel.png", note))
    return pictures
