"""Workers and drivers that are killed: every run ends with the curve of an undisturbed one, each step counted once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.runs.folder import RunFolder
from rayft.train import TrainResult, fit
from tests.train import faults
from tests.train.conftest import Recipes
from tests.train.curves import assert_same, curve_of
from tests.train.test_faults import events

TWO = {"scale.workers": 2, "train.micro_batch_size": 2, "train.save_steps": 4, "data.prompt_loss_weight": 0.0}


@pytest.fixture
def faulty(recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))
    monkeypatch.setenv("RAYFT_TEST_ROWS", "80")
    variables = ["RAYFT_TEST_FAULT", "RAYFT_TEST_ROWS"]

    def make(function: str, /, **changes: Any) -> dict[str, Any]:
        fault = {"train.loss_function": f"{faults.__file__}:{function}", "scale.env": variables}
        return recipe(**({"name": function.replace("_", "-")} | TWO | fault | changes))

    return make


def train(plain: dict[str, Any], **options: Any) -> TrainResult:
    return fit(plain, answer=None, quiet=True, **options)


def test_a_killed_worker(faulty: Callable[..., Any], recipe: Recipes, ray_cluster: str) -> None:
    """Before the first evaluation: the checkpoints so far have no validation loss to be ranked by."""
    late = {"data.validation": 0.1, "train.eval_steps": 20}
    undisturbed = train(recipe(name="calm", **TWO | late | {"scale.workers": 0}))
    killed = train(faulty("kill_once", **late))
    assert_same(curve_of(killed.path), curve_of(undisturbed.path))
    (restart,) = events(killed.path, "restart")
    assert restart["reason"] == "a worker died"
    assert len(events(killed.path, "worker")) == 4, "two workers, twice"


@pytest.mark.slow
def test_one_of_two_workers_out_of_memory(faulty: Callable[..., Any], recipe: Recipes, ray_cluster: str) -> None:
    undisturbed = train(recipe(name="calm", **TWO | {"scale.workers": 0}))
    small = train(faulty("out_of_memory"))
    assert {event["cause"] for event in events(small.path, "failure")} == {"oom"}
    assert_same(curve_of(small.path), curve_of(undisturbed.path))


def driver(plain: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """`rayft train` in a process of its own, on the session's cluster."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(plain))
    log = open(folder / "driver.log", "ab")  # noqa: SIM115 - the process writes into it after we return
    return subprocess.Popen([sys.executable, "-m", "rayft", "train", str(file), *options], stdout=log, stderr=log)


def wait_for(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def test_a_killed_driver_and_resume(recipe: Recipes, ray_cluster: str, tmp_path: Path) -> None:
    slow = {"train.max_steps": 120, "train.save_steps": 10}
    undisturbed = train(recipe(name="calm", **TWO | slow | {"scale.workers": 0}))
    plain = recipe(**TWO | slow)
    process = driver(plain, tmp_path)
    path = Path(plain["storage"], "test")

    def under_way() -> bool:
        return path.exists() and len(RunFolder.open(path).checkpoints()) >= 2

    wait_for(under_way, 240, tmp_path / "driver.log")
    process.kill()
    process.wait()
    assert not RunFolder.open(path).is_alive() and RunFolder.open(path).state == "running"
    lost_at = max(RunFolder.open(path).checkpoints())
    assert driver(plain, tmp_path, "--resume").wait(300) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert_same(curve_of(str(path)), curve_of(undisturbed.path))
    assert events(str(path), "restart")[-1]["step"] >= min(lost_at, 20)


def test_ctrl_c_of_a_cluster_run_saves(recipe: Recipes, ray_cluster: str, tmp_path: Path) -> None:
    plain = recipe(**TWO | {"train.max_steps": 100000, "train.save_steps": 100000})
    process = driver(plain, tmp_path)
    path = Path(plain["storage"], "test")
    wait_for(lambda: path.exists() and len(RunFolder.open(path).metrics()) > 3, 240, tmp_path / "driver.log")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "driver.log").read_text()[-3000:]
    run = RunFolder.open(path)
    assert run.state == "stopped"
    assert max(run.checkpoints()) == run.metrics()[-1]["step"]


@pytest.mark.parametrize(
    ("stage", "then"),
    [("zero3", 1), *(pytest.param("zero2", workers, marks=pytest.mark.slow) for workers in (1, 2))],
)
def test_zero_resumes_on_another_number_of_workers(
    faulty: Callable[..., Any], recipe: Recipes, ray_cluster: str, stage: str, then: int
) -> None:
    undisturbed = train(recipe(name="calm", **TWO | {"scale.workers": 0}))
    plain = faulty("crash_once", **{"scale.strategy": stage, "scale.max_failures": 0})
    with pytest.raises(Exception, match="R604"):
        train(plain)
    resumed = train(plain | {"scale": plain["scale"] | {"workers": then}}, mode="resume")
    assert_same(curve_of(resumed.path), curve_of(undisturbed.path), loss=1e-5, norm=1e-4)


def test_workers_run_where_the_driver_says(recipe: Recipes, ray_cluster: str) -> None:
    result = train(recipe(name="where", **TWO | {"train.max_steps": 1}))
    pids = {event["pid"] for event in events(result.path, "worker")}
    assert len(pids) == 2 and os.getpid() not in pids
