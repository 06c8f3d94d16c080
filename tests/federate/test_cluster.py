"""Actors: how many there are changes nothing, and no death of one, nor of the driver, changes anything either."""

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
import torch
from safetensors.torch import load_file

from rayft.config import load
from rayft.config.federate import Federate
from rayft.errors import RunFailed
from rayft.federate import run
from rayft.federate.books import Books
from rayft.federate.export import export
from rayft.federate.federation import Federation, Plan
from rayft.federate.pool import Actors, Pool
from rayft.runs.folder import RunFolder
from tests.federate.test_rounds import numbers
from tests.federate.toy import ToyJob
from tests.train import faults
from tests.train.conftest import Recipes

Run = Callable[..., Any]


@pytest.fixture
def rounds(tmp_path: Path, ray_cluster: str) -> Run:
    """`rounds(actors, faults=..., **federate)`: (last book, run folder, workers started)."""
    made: list[int] = []

    def go(
        actors: int,
        *,
        faults: tuple[tuple[int, str], ...] = (),
        retries: int = 3,
        seconds: float = 0.02,
        **federate: Any,
    ) -> Any:
        made.append(1)
        home = tmp_path / str(len(made))
        home.mkdir()
        plain = {"name": "toy", "storage": str(home / "runs"), "model": {"base": "m"}, "data": {"train": "x"}}
        folder = RunFolder.create(load(plain), "federate")
        settings = {"rounds": 3, "pack_size": 2, "cohort": {"size": 1.0}} | federate
        job = ToyJob(folder=str(home), faults=faults, seconds=seconds)
        pool: Pool = Actors(job, actors, {"CPU": 0.5})
        events = folder.events_log()
        try:
            book, _ = Federation(
                Federate(**settings),
                Plan("toy", 9, seed=3, learning_rate=0.1, retries=retries),
                pool,
                Books(folder),
                export=export,
                event=lambda kind, **facts: events.append({"kind": kind, **facts}),
            ).run()
        finally:
            pool.close()
        folder.release()
        return book, folder, (home / "loads").stat().st_size

    return go


def test_one_two_and_four_actors_give_the_same_bits(rounds: Run) -> None:
    expected, one, loads = rounds(1)
    assert loads == 1, "one load for the whole run"
    for actors in (2, 4):
        book, folder, loads = rounds(actors)
        assert torch.equal(book.server.state["w"], expected.server.state["w"])
        assert strip(folder) == strip(one) and loads <= actors
        assert book.row["base_loads"] == actors


def strip(folder: RunFolder) -> list[dict[str, Any]]:
    class Holder:
        run = folder

    return numbers(Holder())  # type: ignore[arg-type]


def test_a_killed_actor_costs_only_time(rounds: Run) -> None:
    expected, _, _ = rounds(2)
    book, folder, loads = rounds(2, faults=((3, "die_once"),))
    assert torch.equal(book.server.state["w"], expected.server.state["w"])
    (event,) = [event for event in folder.events() if event["kind"] == "worker_died"]
    assert "clients 2, 3" in event["reason"]
    assert loads <= 3 and book.row["failed"] == 0


def test_a_client_that_always_kills_its_actor_is_given_up(rounds: Run) -> None:
    book, folder, _ = rounds(2, faults=((3, "die"),), retries=1, rounds=1)
    assert book.row["clients"] == 7 and book.row["failed"] == 2, "its block: nobody knows which of the two it was"
    failed = [event for event in folder.events() if event["kind"] == "client_failed"]
    assert {event["client"] for event in failed} == {2, 3}


def test_a_client_that_hangs_is_not_waited_for(rounds: Run) -> None:
    began = time.monotonic()
    book, folder, _ = rounds(2, faults=((3, "hang"),), rounds=2, cohort={"size": 1.0, "deadline_s": 4.0})
    assert time.monotonic() - began < 60
    assert book.row["late"] == 2 and book.row["clients"] == 7 and book.row["failed"] == 0
    assert [event["clients"] for event in folder.events() if event["kind"] == "late"] == [[2, 3], [2, 3]]
    with pytest.raises(RunFailed, match=r"R921.*2 were late"):
        rounds(2, faults=((3, "hang"),), rounds=1, cohort={"size": 1.0, "deadline_s": 4.0, "minimum": 8})


def test_fedbuff_keeps_actors_at_work(rounds: Run) -> None:
    # A second per block, so that both actors have long been there before the last round.
    _, folder, _ = rounds(2, strategy="fedbuff", buffer=4, rounds=6, evaluate={"every": 2}, seconds=1.0)
    rows = folder.metrics()
    assert [row["clients"] for row in rows] == [4] * 6
    assert any(row["staleness"] > 0 for row in rows), "clients that began with an older version came in"
    assert rows[-1]["validation_loss"] < rows[1]["validation_loss"]
    assert [row["round"] for row in rows if "validation_loss" in row] == [2, 4, 6]


# With the tiny model

FEDERATE = {"clients": 5, "rounds": 4, "local_steps": 2, "pack_size": 2}
OPTIONS = {"data.validation": 0.2, "train.max_steps": None, "scale.cpus_per_worker": 1}


def adapters(path: str, number: int) -> dict[str, torch.Tensor]:
    return load_file(Path(path, "rounds", str(number), "adapter", "adapter_model.safetensors"))


def assert_alike(one: str, other: str, rounds: list[int]) -> None:
    for number in rounds:
        a, b = adapters(one, number), adapters(other, number)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), number


@pytest.mark.long
def test_the_tiny_model_gives_the_same_bits_on_one_and_two_actors(recipe: Recipes, ray_cluster: str) -> None:
    paths = []
    for workers in (1, 2):
        plain = recipe(name=f"on-{workers}", federate={**FEDERATE, "rounds": 2}, **OPTIONS | {"scale.workers": workers})
        paths.append(run(plain, quiet=True).path)
    assert_alike(*paths, [1, 2])
    first, second = (RunFolder.open(path).metrics() for path in paths)
    assert [row["validation_loss"] for row in first] == [row["validation_loss"] for row in second]
    assert first[-1]["base_loads"] == 1 and second[-1]["base_loads"] == 2


@pytest.mark.long
def test_a_killed_driver(recipe: Recipes, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle of a round; `--resume` gives the rounds of an undisturbed run."""
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))
    fault = {"train.loss_function": f"{faults.__file__}:paced", "scale.env": ["RAYFT_TEST_FAULT"], "scale.workers": 2}
    calm = run(recipe(name="calm", federate=FEDERATE, **OPTIONS | fault), quiet=True)
    plain = recipe(name="killed", federate=FEDERATE, **OPTIONS | fault)
    (tmp_path / "pace").write_text("0.1")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(plain))
    folder = Path(plain["storage"], "killed")
    with open(tmp_path / "driver.log", "wb") as log:
        command = [sys.executable, "-m", "rayft", "federate", str(file)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 120
    while not (folder / "rounds" / "2" / ".complete").is_file():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "driver.log").read_text()
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "rounds" / "4" / ".complete").is_file() and RunFolder.open(folder).state == "running"
    (tmp_path / "pace").unlink()
    result = run(plain, quiet=True, mode="resume")
    assert result.rounds == 4
    assert_alike(result.path, calm.path, [2, 3, 4])
    rows, expected = (RunFolder.open(path).metrics() for path in (result.path, calm.path))
    assert [(r["step"], r["loss"], r["validation_loss"]) for r in rows] == [
        (r["step"], r["loss"], r["validation_loss"]) for r in expected
    ]


@pytest.mark.long
def test_a_killed_actor_with_the_tiny_model(
    recipe: Recipes, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))
    settings = {**FEDERATE, "rounds": 2}
    calm = run(recipe(name="calm", federate=settings, **OPTIONS | {"scale.workers": 2}), quiet=True)
    fault = {"train.loss_function": f"{faults.__file__}:kill_once", "scale.env": ["RAYFT_TEST_FAULT"]}
    killed = run(recipe(name="killed", federate=settings, **OPTIONS | fault | {"scale.workers": 2}), quiet=True)
    rows = RunFolder.open(killed.path).metrics()
    assert [event["kind"] for event in RunFolder.open(killed.path).events()].count("worker_died") == 1
    expected = RunFolder.open(calm.path).metrics()
    assert [row["clients"] for row in rows] == [5, 5]
    for ours, theirs in zip(rows, expected, strict=True):  # another function, whose rounding is its own
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)
