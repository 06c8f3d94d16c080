"""The pictures of a sweep are written at every stage of it, and the numbers in them are right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rayft.tune import importance as importance_module
from rayft.tune.importance import importance
from rayft.tune.objective import Objective
from rayft.tune.parallel import plot_parallel
from rayft.tune.plots import plot_curves, plot_front, plot_history, plot_importance
from rayft.tune.rows import TrialRow
from tests.tune.sweeps import sweep, trial

LOSS = Objective("validation_loss")
BOTH = [LOSS, Objective("latency_ms")]
SPACE: dict[str, BaseDistribution] = {
    "adapter.rank": CategoricalDistribution([4, 8, 16, 32, 64]),
    "adapter.target_modules": CategoricalDistribution(["encoded", "differently"]),
    "adapter.dropout": CategoricalDistribution([0.0, 0.05, 0.1]),
    "train.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "train.lr_scheduler_type": CategoricalDistribution(["cosine", "linear", "constant"]),
    "train.warmup_steps": FloatDistribution(0, 0.1),
}
STAGES: dict[str, list[TrialRow]] = {
    "nothing": [],
    "one": [trial(0)],
    "one at work": [trial(0, "running", 0, value=None)],
    "all failed": [trial(n, "failed", 0, value=None, facts={"reason": "nan"}) for n in range(3)],
    "all pruned": [trial(n, "pruned", 25) for n in range(12)],
    "not a number": [trial(0, value=math.nan), trial(1, value=math.inf), trial(2, value=0.5)],
    "all equal": [trial(n, value=0.0) for n in range(12)],
    "no parameters": [TrialRow(n, {}, "complete", 4, 4, {"validation_loss": 1.0 + n}) for n in range(9)],
    "no steps": [TrialRow(0, {"adapter.rank": 4}, "failed", 0, 0)],
    "odd values": [
        trial(n, values={"adapter.layers": [None, [1, 2], "all"][n % 3], "data.mix": {"a": n}, "x.on": n > 3})
        for n in range(9)
    ],
    "many": sweep(60, running=5, failed=(3, 8)),
}


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


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_pictures(stage: str, tmp_path: Path) -> None:
    rows, path = STAGES[stage], tmp_path / "picture.png"
    for draw in (
        lambda: plot_history(rows, [LOSS], path),
        lambda: plot_history(rows, BOTH, path),
        lambda: plot_curves(rows, LOSS, path, rungs=(25,)),
        lambda: plot_front(rows, BOTH, path),
        lambda: plot_front(rows, [*BOTH, Objective("x")], path),
        lambda: plot_parallel(rows, LOSS, SPACE, path),
        lambda: plot_importance(importance(rows, [LOSS], SPACE), path),
    ):
        draw()
        assert imread(path).shape[1] == 1350
        path.unlink()


def test_history(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [trial(0, value=0.7), trial(1, "pruned", 100, value=0.2), trial(2, value=0.5), trial(3, value=0.6)]
    plot_history([*rows, trial(4, "failed", 0, value=None)], [LOSS], tmp_path / "history.png")
    top, below = drawn[0].axes
    assert legend(drawn[0]) == ["complete", "best so far", "best 0.5 (trial 2)"]
    assert list(top.lines[0].get_ydata()) == [0.7, 0.5, 0.6]
    assert list(top.lines[1].get_ydata()) == [0.7, 0.5, 0.5, 0.5] and top.lines[1].get_xdata()[-1] == 4
    heights = {round(bar.get_x() + 0.4): bar.get_height() for group in below.containers for bar in group}
    assert {number: heights[number] for number in range(4)} == {0: 100, 1: 25, 2: 100, 3: 100}
    assert 0 < heights[4] < 3, "a trial that failed at once is seen"


def test_history_of_what_is_maximised(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [trial(n, metrics={"exact_match": value}) for n, value in enumerate([0.2, 0.9, 0.4])]
    plot_history(rows, [Objective("exact_match", "max")], tmp_path / "history.png")
    assert legend(drawn[0])[-1] == "best 0.9 (trial 1)"


def test_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        trial(0, value=0.5, history=((1, 2.0), (2, math.nan), (3, 0.5))),
        trial(1, "pruned", 2, history=((1, 3.0), (2, 2.5))),
        trial(2, "failed", 1, value=None, history=()),
    ]
    plot_curves(rows, LOSS, tmp_path / "curves.png", rungs=(1, 2))
    assert set(legend(drawn[0])) == {"best (trial 0)", "pruned", "rung"}
    curves = [list(line.get_ydata()) for line in drawn[0].axes[0].lines]
    assert [2.0, 0.5] in curves and [3.0, 2.5] in curves


def test_front(tmp_path: Path, drawn: list[Figure]) -> None:
    values = [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 400.0)]
    rows = [trial(n, metrics={"validation_loss": a, "latency_ms": b}) for n, (a, b) in enumerate(values)]
    plot_front(rows, BOTH, tmp_path / "front.png")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log" and axes.get_xscale() == "linear"
    assert list(axes.lines[1].get_xdata()) == [1.0, 2.0]
    assert [text.get_text() for text in axes.texts] == ["0", "1"]


def test_parallel(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        trial(0, value=0.5, values={"train.learning_rate": 1e-5, "adapter.rank": 4}),
        trial(1, value=0.7, values={"train.learning_rate": 1e-3, "adapter.rank": 64, "train.warmup_steps": 0.1}),
        trial(2, "pruned", 25, values={"train.learning_rate": 1e-4, "adapter.rank": 16}),
    ]
    plot_parallel(rows, LOSS, SPACE, tmp_path / "parallel.png", "a title")
    (axes,) = drawn[0].axes
    pruned, worse, best = (line.get_ydata() for line in axes.lines[:3])
    assert np.allclose(best, [0, 0, -0.13, 0], atol=0.021)  # rank, log learning rate, warm-up not used, loss
    assert np.allclose(worse, [1, 1, 0.5, 1], atol=0.021)
    assert np.allclose(pruned, [0.5, 0.5, -0.13], atol=0.021), "no result is drawn for a pruned trial"
    assert {"rank", "learning\nrate", "1e-5", "not used"} <= {text.get_text() for text in axes.texts}


def test_the_parameter_that_decides_is_the_important_one() -> None:
    rows = sweep(60)
    shares = importance(rows, [LOSS], SPACE)
    assert next(iter(shares)) == "train.learning_rate" and shares["train.learning_rate"] > 0.5
    assert set(shares) == set(SPACE), "lists and conditional parameters take part"
    assert sum(shares.values()) == pytest.approx(1)


def test_importance_is_optunas_where_all_trials_are_complete() -> None:
    """Optuna's own study of the same trials, without our ranks; its default looks at the same best tenth."""
    import optuna

    rng = np.random.default_rng(0)
    space: dict[str, BaseDistribution] = {"a": FloatDistribution(0, 1), "b": IntDistribution(1, 64, log=True)}
    points = [{"a": float(rng.random()), "b": int(2 ** rng.integers(0, 7))} for _ in range(80)]
    losses = [point["a"] ** 2 + 0.05 * math.log2(point["b"]) for point in points]
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(value=loss, params=point, distributions=space)
            for point, loss in zip(points, losses, strict=True)
        ]
    )
    rows = [
        TrialRow(n, point, "complete", 1, 1, {"validation_loss": loss})
        for n, (point, loss) in enumerate(zip(points, losses, strict=True))
    ]
    assert importance(rows, [LOSS], space) == pytest.approx(optuna.importance.get_param_importances(study))


def test_importance_keeps_quiet_about_few_trials_and_points_outside_the_space(
    recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    few = importance_module.LEAST_TRIALS - 1
    assert importance(sweep(60)[:few], [LOSS], SPACE) == {}
    outside = [trial(n, values={"train.learning_rate": 10.0**-n, "adapter.rank": 4}) for n in range(12)]
    assert importance(outside, [LOSS], SPACE) == {"train.learning_rate": 1.0}
    assert importance(sweep(60), BOTH, SPACE)
    assert not recwarn.list and capfd.readouterr().err == ""
