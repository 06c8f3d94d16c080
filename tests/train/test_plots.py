"""The pictures are written at every stage of a run, and the numbers in them are right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rayft.train.plots import plot_compare, plot_run, smooth


def curve(steps: int, every: int = 10) -> list[dict[str, Any]]:
    rng = np.random.default_rng(steps)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = float(0.2 + 2 * math.exp(-6 * step / steps) + 0.05 * rng.random())
        rows.append({"step": step, "loss": loss, "grad_norm": 2 * loss, "learning_rate": 1e-3 * (1 - step / steps)})
        if step % every == 0:
            rows[-1]["validation_loss"] = loss + 0.1
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the files."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_run(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = curve(60)
    rows[29]["validation_loss"] = 0.125
    restarts = [{"kind": "restart", "step": step} for step in (20, 40, 40)]
    plot_run(rows, [*restarts, {"kind": "oom", "step": 3}], tmp_path / "loss.png", "my run")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[1] == 1350 and picture.std() > 0.01
    (figure,) = drawn
    assert legend(figure) == ["training loss (smoothed)", "validation loss", "best 0.125 (step 30)", "3 restarts"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "gradient norm", "learning rate"]
    raw = figure.axes[0].lines[0]
    assert list(raw.get_ydata()) == [row["loss"] for row in rows]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "validation_loss": 2.0}],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}],
        curve(2),
        curve(3),
    ],
)
def test_every_stage_of_a_run_has_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_run(rows, [], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[2] == 4


def test_nothing_above_the_panel_overlaps(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_run(curve(60), [{"kind": "restart", "step": 30}], tmp_path / "loss.png", "a title of some length " * 3)
    (figure,) = drawn
    title = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    box = figure.axes[0].get_legend().get_window_extent()
    panel = figure.axes[0].get_window_extent()
    assert panel.y1 <= box.y0 and box.y1 <= title.y0
    assert box.x1 <= figure.bbox.x1 and title.x1 <= figure.bbox.x1


def test_a_spike_does_not_flatten_the_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = curve(100)
    rows[50]["loss"] = 500.0
    plot_run(rows, [], tmp_path / "loss.png")
    (figure,) = drawn
    assert figure.axes[0].get_ylim()[1] < 5
    assert "↑ up to 500" in [text.get_text() for text in figure.axes[0].texts]


def test_compare_returns_the_largest_difference(tmp_path: Path, drawn: list[Figure]) -> None:
    first = curve(40)
    second = [dict(row) for row in first]
    second[17]["loss"] += 0.25
    third = [dict(row, step=row["step"] + 100) for row in first]
    events = [{"kind": "restart", "step": 10}]
    path = tmp_path / "kill.png"
    assert plot_compare({"undisturbed": first, "killed": second}, events, path) == pytest.approx(0.25)
    assert legend(drawn[0]) == ["undisturbed", "killed", "restart"]
    assert plot_compare({"undisturbed": first, "killed": first}, events, path) == 0.0
    assert drawn[1].axes[1].get_title(loc="right") == "identical at every step"
    assert plot_compare({"undisturbed": first, "elsewhere": third}, [], path) == 0.0
    assert drawn[2].axes[1].get_title(loc="right") == ""


def test_smoothing_keeps_level_and_trend_and_ignores_a_spike() -> None:
    assert smooth([3.0] * 50, 4) == pytest.approx([3.0] * 50)
    line = np.linspace(2.0, 1.0, 200)
    assert smooth(list(line), 3)[20:-20] == pytest.approx(line[20:-20])  # no lag
    spiked = [1.0] * 50
    spiked[25] = 1000.0
    assert smooth(spiked, 4) == pytest.approx([1.0] * 50)
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]
