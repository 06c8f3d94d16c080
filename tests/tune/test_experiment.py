"""What we write is read back with Ray Tune's own tools."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas
import pytest
from ray.tune import ExperimentAnalysis
from ray.tune.experiment import Trial

from rayft.runs.lines import read_lines
from rayft.runs.storage import locate
from rayft.tune import experiment
from rayft.tune.study import LOG, Study
from tests.tune.conftest import SPACE, sweep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A sweep with a complete, a pruned, a failed, a running and a waiting trial, and an adapter of the first one."""
    space = SPACE | {"adapter.target_modules": {"choice": ["mlp", ["q_proj"]]}}
    study = Study(sweep(num_samples=5, space=space), tmp_path, budget=9)
    for number in range(5):
        proposal = study.next("lane-0")
        assert proposal is not None
        for step in (2, 4):
            loss = math.nan if number == 2 and step == 4 else 3 - number / 10 - step / 4
            study.report(number, step, {"validation_loss": loss, "perplexity": math.exp(loss)})
    study.finish(0, "complete", {}, {"tokens_per_second": 7.0, "trainable_parameters": 12})
    study.finish(1, "pruned", {}, {})
    study.finish(2, "failed", {}, {"reason": "the loss is nan"})
    study.give_back(4)
    adapter = tmp_path / "trials" / "0" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    log = read_lines(locate(tmp_path / LOG))
    assert experiment.write(str(tmp_path), study.rows(), log) == str(tmp_path / "tune")
    experiment.write(str(tmp_path), study.rows(), log)  # again, as after every trial
    study.close()
    return tmp_path


def test_experiment_analysis(run: Path) -> None:
    analysis = ExperimentAnalysis(run / "tune", default_metric="validation_loss", default_mode="min")
    assert [trial.status for trial in analysis.trials] == [
        Trial.TERMINATED,
        Trial.TERMINATED,
        Trial.ERROR,
        Trial.PENDING,  # Ray reads a running trial as one to be started again
        Trial.PENDING,
    ]
    assert analysis.best_trial.trial_id == "00004"
    assert set(analysis.best_config) == {*SPACE, "adapter.target_modules"}
    frame = analysis.trial_dataframes["00000"]
    assert frame["step"].tolist() == [2, 4] and frame["training_iteration"].tolist() == [1, 2]
    assert frame["validation_loss"].tolist() == [2.5, 2.0]
    assert frame["done"].tolist() == [False, True]
    last = analysis.trials[0].last_result
    assert last["tokens_per_second"] == 7.0 and last["trainable_parameters"] == 12 and last["state"] == "complete"


def test_result_grid(run: Path) -> None:
    grid = experiment.read(str(run), "validation_loss", "min")
    assert len(grid) == 5 and grid.num_terminated == 2 and grid.num_errors == 1
    assert grid[0].config is not None and set(SPACE) <= set(grid[0].config)
    assert grid[0].metrics is not None and grid[0].metrics["validation_loss"] == 2.0
    assert str(grid.errors[0]).strip() == "the loss is nan"
    assert grid[0].checkpoint is not None and grid[0].checkpoint.path == str(run / "trials/0/adapter")
    frame = grid.get_dataframe()
    assert frame["validation_loss"].notna().sum() == 4
    assert "config/train.learning_rate" in frame.columns
    best = grid.get_best_result()
    assert best.metrics is not None and best.metrics["validation_loss"] == pytest.approx(1.6)


def test_plain_files(run: Path) -> None:
    folder = run / "tune" / "trial-00001"
    assert set(json.loads((folder / "params.json").read_text())) == {*SPACE, "adapter.target_modules"}
    table = pandas.read_csv(folder / "progress.csv")
    assert table["validation_loss"].tolist() == pytest.approx([2.4, 1.9])
    assert (run / "tune/trial-00002/error.txt").read_text() == "the loss is nan\n"
    assert len(list((run / "tune").glob("experiment_state-*.json"))) == 1
