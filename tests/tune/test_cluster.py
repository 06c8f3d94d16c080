"""Sweeps on a cluster: lanes as trials of Ray Tune, killed lanes, killed drivers, and no trial counted twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune import ExperimentAnalysis

from rayft.errors import RayftError
from rayft.runs import reference
from rayft.runs.folder import RunFolder
from rayft.tune import search
from tests.train import faults
from tests.train.conftest import Recipes
from tests.train.test_chaos import wait_for
from tests.tune.test_study import trials_of

SPACE: dict[str, Any] = {"train.learning_rate": {"loguniform": [1e-4, 1e-3]}, "adapter.rank": {"choice": [2, 4]}}
BASE = {
    "train.max_steps": 8,
    "train.eval_steps": 2,
    "train.save_steps": 1,
    "data.validation": 0.25,
    "scale.workers": "auto",
    "scale.cpus_per_worker": 1,
}


def sweep(recipe: Recipes, name: str, /, recipe_changes: dict[str, Any] | None = None, **tune: Any) -> dict[str, Any]:
    section = {"space": SPACE, "num_samples": 6, "search_alg": "qmc", "scheduler": "none", "pack_size": 2, "lanes": 2}
    return recipe(**BASE | {"name": name, "tune": section | tune} | (recipe_changes or {}))


def histories(rows: Any) -> dict[tuple[Any, ...], dict[int, float]]:
    """Values of a trial -> its curve; which lane proposes first is chance, so numbers may differ."""
    return {tuple(sorted(row.values.items())): dict(row.history) for row in rows}


def assert_counted_once(path: str, trials: int, steps: int = 8) -> None:
    """Every trial complete in Optuna, each report once in the log, all of it in Ray Tune's experiment."""
    run = Path(path)
    found = trials_of(run, run.name)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * trials
    assert all(list(trial.intermediate_values) == list(range(2, steps + 1, 2)) for trial in found)
    log = [(row["trial"], row["trial_step"]) for row in RunFolder.open(run).metrics() if row["event"] == "report"]
    assert len(log) == len(set(log)) == trials * steps // 2
    analysis = ExperimentAnalysis(run / "tune")
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * trials
    assert len(analysis.dataframe()) == trials
    assert not list(run.glob("trials/*/state.pt"))


def same_curves(ours: Any, theirs: Any) -> None:
    one, two = histories(ours), histories(theirs)
    assert one.keys() == two.keys()
    for values, curve in one.items():
        assert curve == pytest.approx(two[values], abs=1e-5)


def test_two_lanes_find_what_one_process_finds(recipe: Recipes, ray_cluster: str) -> None:
    here = search(sweep(recipe, "here", {"scale.workers": 0}), quiet=True)
    there = search(sweep(recipe, "there"), quiet=True)
    same_curves(there.rows, here.rows)
    assert {row.lane for row in there.rows} == {"lane-0", "lane-1"}
    assert_counted_once(there.path, 6)
    assert reference.resolve("run:there", str(Path(there.path).parent)).kind == "adapter"


def test_a_killed_lane(recipe: Recipes, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))
    fault = {"train.loss_function": f"{faults.__file__}:kill_once", "scale.env": ["RAYFT_TEST_FAULT"]}
    plain = {"train.loss_function": f"{faults.__file__}:plain"}
    killed = search(sweep(recipe, "killed", fault), quiet=True)
    calm = search(sweep(recipe, "calm", plain | {"scale.workers": 0}), quiet=True)
    same_curves(killed.rows, calm.rows)
    assert_counted_once(killed.path, 6)
    assert "died; its trials" in Path(killed.report).read_text()


def test_a_lane_that_always_fails(recipe: Recipes, ray_cluster: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))
    monkeypatch.setenv("RAYFT_TEST_ROWS", "1")
    fault = {
        "train.loss_function": f"{faults.__file__}:crash_always",
        "scale.env": ["RAYFT_TEST_FAULT", "RAYFT_TEST_ROWS"],
        "scale.max_failures": 0,
    }
    with pytest.raises(RayftError, match=r"R741.*crash with"):
        search(sweep(recipe, "hopeless", fault), quiet=True)
    assert RunFolder.open(Path(recipe()["storage"]) / "hopeless").state == "failed"


def driver(plain: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """`rayft tune` in a process of its own, on the session's cluster."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(plain))
    log = open(folder / "driver.log", "ab")  # noqa: SIM115 - the process writes into it after we return
    return subprocess.Popen([sys.executable, "-m", "rayft", "tune", str(file), *options], stdout=log, stderr=log)


def ended(run: Path) -> int:
    """Trials that have ended, by the log."""
    if not (run / "run.json").exists():
        return 0
    return sum(row["event"] != "report" for row in RunFolder.open(run).metrics())


def test_a_killed_driver_and_resume(recipe: Recipes, ray_cluster: str, tmp_path: Path) -> None:
    longer = {"train.max_steps": 40}
    calm = search(sweep(recipe, "calm", longer | {"scale.workers": 0}), quiet=True)
    plain = sweep(recipe, "orphan", longer)
    run = Path(plain["storage"], "orphan")
    process = driver(plain, tmp_path)
    wait_for(lambda: ended(run) >= 1, 300, tmp_path / "driver.log")
    process.kill()
    process.wait()
    assert RunFolder.open(run).state == "running" and not RunFolder.open(run).is_alive()
    done = ended(run)
    assert driver(plain, tmp_path, "--resume").wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert 1 <= done < 6, "killed on the way"
    assert_counted_once(str(run), 6, steps=40)
    again = search(plain, mode="resume", quiet=True)
    same_curves(again.rows, calm.rows)


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on(recipe: Recipes, ray_cluster: str, tmp_path: Path) -> None:
    plain = sweep(recipe, "stopped", {"train.max_steps": 60}, num_samples=4)
    run = Path(plain["storage"], "stopped")
    process = driver(plain, tmp_path)
    wait_for(lambda: (run / "metrics.jsonl").exists() and ended(run) < 4, 300, tmp_path / "driver.log")
    process.send_signal(signal.SIGINT)
    assert process.wait(200) == 130, (tmp_path / "driver.log").read_text()[-3000:]
    assert RunFolder.open(run).state == "stopped" and list(run.glob("trials/*/state.pt"))
    assert driver(plain, tmp_path, "--resume").wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert_counted_once(str(run), 4, steps=60)


@pytest.mark.parametrize("workers", ["auto", pytest.param(2, marks=pytest.mark.slow)])
def test_classic_trials(recipe: Recipes, ray_cluster: str, workers: Any) -> None:
    changes = {"scale.workers": workers}
    tune = {"execution": "classic", "num_samples": 2}
    result = search(sweep(recipe, f"classic-{workers}", changes, **tune), quiet=True)
    assert_counted_once(result.path, 2)
    here = search(sweep(recipe, "here", {"scale.workers": 0}, num_samples=2), quiet=True)
    same_curves(result.rows, here.rows)


@pytest.mark.slow
def test_a_population_of_runs(ray_cluster: str, recipe: Recipes) -> None:
    """Two lanes, three trials that take turns; those that could not learn take the good one over."""
    space = {"train.learning_rate": {"loguniform": [1e-7, 1e-2]}}
    points = [{"train.learning_rate": rate} for rate in (1e-7, 2e-3, 1e-7)]
    arguments = {"perturbation_interval": 100, "quantile_fraction": 0.34, "resample_probability": 0.0}
    tune = {"space": space, "points_to_evaluate": points, "num_samples": 3, "scheduler_args": arguments, "lanes": 2}
    steps = {"train.max_steps": 400, "data.validation": 0.25, "train.lr_scheduler_type": "constant"}
    plain = recipe(name="population", tune=tune | {"scheduler": "pbt"}, **steps, **{"scale.workers": "auto"})
    result = search(plain, quiet=True)
    assert [(row.state, row.step) for row in result.rows] == [("complete", 400)] * 3
    taken = [row.number for row in result.rows if "taken_over" in row.facts]
    assert taken and all(result.rows[number].values["train.learning_rate"] > 1e-3 for number in taken)
    assert len({row.lane for row in result.rows}) == 2
