"""Jobs on a real cluster of two nodes with token authentication (cluster/local.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import RunFailed, UsageError
from rayft.runs.folder import RunFolder
from rayft.runtime import jobs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

PRINTING = (
    "python",
    "-c",
    "import os; print('SECRET' in os.environ, sorted(os.listdir('.')), open('recipe.yaml').read())",
)


@pytest.fixture
def client(two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process as a user's machine that has the token, and RAY_AUTH_MODE unset."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", two_nodes.environment["RAY_AUTH_TOKEN_PATH"])
    return two_nodes


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: str) -> dict[str, Any]:
    """Eight steps of the tiny model on two workers, one on each node."""
    rows = tmp_path / "rows.jsonl"
    chats = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        for n in range(32)
    ]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {
        "name": "job",
        "storage": str(tmp_path / "runs"),
        "model": {"base": tiny_model_folder, "dtype": "fp32"},
        "adapter": {"rank": 4},
        "data": {"train": str(rows), "max_length": 64},
        "train": {"global_batch_size": 4, "max_steps": 8, "save_steps": 4},
        "scale": {"workers": 2},
    }


def assert_trained(storage: Path) -> None:
    run = RunFolder.open(storage / "job")
    assert run.state == "finished" and run.result() is not None
    assert [row["step"] for row in run.metrics()] == list(range(1, 9))
    assert 8 in run.checkpoints()


def test_ray_job_submit_trains_on_two_nodes(two_nodes: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The command of the README: a working directory with a recipe, `python -m rayft.train` as the entry point."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", two_nodes.dashboard]
    command += ["--working-dir", str(folder), "--", "python", "-m", "rayft.train", "recipe.yaml"]
    done = subprocess.run(command, env=two_nodes.client_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout and "8/8" in done.stdout, "progress stands in the job's log"
    assert_trained(tmp_path / "runs")


def test_a_relative_storage_is_refused_in_a_job(two_nodes: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "storage": "runs"}))
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", two_nodes.dashboard]
    command += ["--working-dir", str(folder), "--", "python", "-m", "rayft.train", "recipe.yaml"]
    done = subprocess.run(command, env=two_nodes.client_environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "R109" in done.stdout and "Traceback" not in done.stdout


def test_without_the_token_nothing_is_submitted(client: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as stranger:
        stranger.delenv("RAY_AUTH_TOKEN_PATH")
        stranger.setenv("HOME", str(tmp_path))
        with pytest.raises(UsageError, match="R502"):
            jobs.submit(recipe, address=client.dashboard)


def test_submit_uploads_files_passes_variables_and_follows(
    client: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "do-not-print-me")
    log: list[str] = []
    job = jobs.submit(
        {**recipe, "scale": {"env": ["SECRET"]}}, address=client.dashboard, entrypoint=PRINTING, log=log.append
    )
    text = "".join(log)
    assert job["status"] == "SUCCEEDED" and job["run"] == "job"
    assert "True ['files', 'recipe.yaml']" in text and "path: files/0/rows.jsonl" in text
    assert "do-not-print-me" not in text


def test_the_jobs_end_is_ours(client: Any, recipe: dict[str, Any]) -> None:
    for code, error in ((1, RunFailed), (2, UsageError)):
        with pytest.raises(error, match="R514.*exit code 1" if code == 1 else "R515"):
            jobs.submit(recipe, address=client.dashboard, entrypoint=("python", "-c", f"raise SystemExit({code})"))


@pytest.mark.slow
def test_rayft_submit_trains(two_nodes: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "rayft", "submit", "recipe.yaml", "--address", two_nodes.dashboard]
    done = subprocess.run(command, cwd=tmp_path, env=two_nodes.client_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "8/8" in done.stderr
    assert_trained(tmp_path / "runs")

    again = subprocess.run(command, cwd=tmp_path, env=two_nodes.client_environment(), capture_output=True, text=True)
    assert again.returncode == 2 and "R402" in again.stderr, "the name is in use: the job's exit code is ours"
