"""The machine of rounds on clients that fit a line: identities, budgets, broken clients, stops and resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayft.config import load
from rayft.config.federate import Federate
from rayft.errors import RayftError, RunFailed, RunStopped, UsageError
from rayft.federate.books import Book, Books, check_same
from rayft.federate.export import export
from rayft.federate.federation import Federation, Plan
from rayft.federate.pool import Here
from rayft.runs.folder import RunFolder
from tests.federate.toy import ToyJob, gradient, points

POPULATION = 10
RATE = 0.1


class Toys:
    """A run of the toy in a folder, with options that may change from call to call."""

    def __init__(self, folder: Path, job: ToyJob, population: int = POPULATION, **federate: Any) -> None:
        self.folder, self.job, self.population = folder, job, population
        self.federate = {"rounds": 5, "pack_size": 3, "cohort": {"size": 0.6}} | federate

    def federation(self, stop_after: int | None = None, **changes: Any) -> Federation:
        resolved = load({"name": "toy", "storage": str(self.folder), "model": {"base": "m"}, "data": {"train": "x"}})
        place = self.folder / "toy"
        run = RunFolder.open(place) if place.exists() else RunFolder.create(resolved, "federate")
        self.run = run
        self.books = Books(run)
        done: list[int] = []
        events = run.events_log()
        return Federation(
            Federate(**(self.federate | changes)),
            Plan("toy", self.population, seed=3, learning_rate=RATE, save_total_limit=None),
            Here(self.job),
            self.books,
            export=export,
            told=lambda row: done.append(row["round"]),
            event=lambda kind, **facts: events.append({"kind": kind, **facts}),
            stopping=lambda: stop_after is not None and len(done) >= stop_after,
        )


Make = Callable[..., Toys]


@pytest.fixture
def toys(tmp_path: Path) -> Make:
    made: list[int] = []

    def make(*, faults: tuple[tuple[int, str], ...] = (), steps: int = 3, **federate: Any) -> Toys:
        made.append(1)
        population = federate.pop("population", POPULATION)
        folder = tmp_path / str(len(made))
        return Toys(folder, ToyJob(steps=steps, faults=faults), population, **federate)

    return make


def final(toys: Toys, **changes: Any) -> torch.Tensor:
    book, _ = toys.federation(**changes).run()
    return book.server.state["w"]


def same(one: Book, other: Book) -> None:
    """Every tensor of the server, the rows and the tallies, bit for bit."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}
        if isinstance(value, list):
            return {k: v for n, inner in enumerate(value) for k, v in flat(inner, f"{path}/{n}").items()}
        return {path: value}

    a, b = flat(one.plain()), flat(other.plain())
    assert a.keys() == b.keys()
    for key, value in a.items():
        if key.endswith(("seconds", "worker_memory_gb", "base_loads")):
            continue
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def numbers(toys: Toys) -> list[dict[str, Any]]:
    """The rows without what a clock or the machine says."""
    machine = ("time", "seconds", "worker_memory_gb", "base_loads")
    return [{key: value for key, value in row.items() if key not in machine} for row in toys.run.metrics()]


def test_rounds_learn(toys: Make) -> None:
    toy = toys(rounds=30)
    book, ended = toy.federation().run()
    assert ended == "rounds" and book.server.rounds == 30
    rows = toy.run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["validation_loss"] < 0.1 * rows[0]["validation_loss"]
    assert book.best is not None and book.best[1] == min(row["validation_loss"] for row in rows)
    assert all(row["clients"] == 6 for row in rows)
    assert rows[-1]["mb_total"] == pytest.approx(30 * 6 * 2 * 16 / 1e6)


def test_one_client_and_one_step_is_a_central_step(toys: Make) -> None:
    x, y = points(0)
    w = np.zeros(2)
    for _ in range(4):
        w = w - RATE * gradient(w, x, y)
    found = final(toys(population=1, steps=1, rounds=4, cohort={"size": 1.0}))
    assert found.tolist() == pytest.approx(w.tolist(), abs=1e-15)


def test_clients_with_one_step_each_are_one_large_batch(toys: Make) -> None:
    """Weighted by examples, the mean of the clients' gradients is that of all examples."""
    parts = [points(client) for client in range(POPULATION)]
    x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    w = np.zeros(2)
    for _ in range(3):
        w = w - RATE * gradient(w, x, y)
    found = final(toys(steps=1, rounds=3, cohort={"size": 1.0}))
    assert found.tolist() == pytest.approx(w.tolist(), abs=1e-14)


@pytest.mark.parametrize(
    "other",
    [
        {"strategy": "fedavgm", "server_momentum": 0.0},
        {"strategy": "multi_krum", "weights": "uniform"},
        {"strategy": "fedbuff", "buffer": POPULATION},
        {"privacy": {"noise_multiplier": 0.0, "clip": None}, "cohort": {"size": 1.0, "sampling": "poisson"}},
    ],
    ids=str,
)
def test_what_is_fedavg_by_another_name(toys: Make, other: dict[str, Any]) -> None:
    expected = final(toys(weights="uniform", cohort={"size": 1.0}))
    weights = {} if "privacy" in other else {"weights": "uniform"}
    found = final(toys(**{"cohort": {"size": 1.0}, **weights, **other}))
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "fedadam"},
        {"strategy": "fedavgm", "lr_schedule": "cosine"},
        {"strategy": "fedyogi", "cohort": {"size": 0.5, "sampling": "poisson"}},
        {"strategy": "fedadagrad", "wire": "bf16"},
        {
            "privacy": {"noise_seed": 4, "adaptive": True, "noise_multiplier": 0.5, "count_stddev": 2.0},
            "cohort": {"size": 0.5, "sampling": "poisson"},
        },
    ],
    ids=str,
)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(toys: Make, settings: dict[str, Any]) -> None:
    whole, parts = toys(**settings), toys(**settings)
    expected, _ = whole.federation().run()
    with pytest.raises(RunStopped, match="R940"):
        parts.federation(stop_after=2).run()
    assert parts.books.rounds() == [1, 2]
    with pytest.raises(RunStopped):
        parts.federation(stop_after=1).run()
    found, _ = parts.federation().run()
    same(found, expected)
    assert parts.books.releases() == whole.books.releases()
    assert numbers(parts) == numbers(whole)


def test_a_kill_between_round_and_metrics_is_mended(toys: Make) -> None:
    toy = toys()
    toy.federation().run()
    expected = toy.run.metrics()
    lines = Path(toy.run.path, "metrics.jsonl")
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]) + '{"step": 5, "ti')
    toy.federation().run()
    assert [row["step"] for row in RunFolder.open(toy.run.path).metrics()] == [row["step"] for row in expected]


def test_a_round_that_was_cut_off_is_not_there(toys: Make) -> None:
    toy = toys()
    with pytest.raises(RunStopped):
        toy.federation(stop_after=3).run()
    whole = toys()
    expected, _ = whole.federation().run()
    Path(toy.run.path, "rounds", "3", ".complete").unlink()
    assert toy.books.rounds() == [1, 2]
    found, _ = toy.federation().run()
    same(found, expected)


def test_a_resume_never_refunds(toys: Make) -> None:
    """A release that is in the ledger costs, though its round was cut off; the round's own costs again."""
    private = {"privacy": {"noise_seed": 4, "epsilon": 30.0}, "cohort": {"size": 0.5, "sampling": "poisson"}}
    toy = toys(rounds=3, **private)
    with pytest.raises(RunStopped):
        toy.federation(stop_after=2).run()
    Path(toy.run.path, "rounds", "2", ".complete").unlink()
    book, _ = toy.federation().run()
    assert [release.round for release in toy.books.releases()] == [1, 2, 2, 3]
    uncut, _ = toys(rounds=4, **private).federation().run()
    assert book.row["epsilon"] == uncut.row["epsilon"]


def test_the_run_ends_before_the_budget_is_exceeded(toys: Make) -> None:
    toy = toys(rounds=50, privacy={"epsilon": 5.0, "delta": 1e-3}, cohort={"size": 0.5, "sampling": "poisson"})
    book, ended = toy.federation().run()
    assert ended == "privacy" and 1 < book.server.rounds < 50
    assert book.row["epsilon"] <= 5.0
    again, ended = toy.federation().run()
    assert (again.server.rounds, ended) == (book.server.rounds, "privacy"), "a resume does not spend more either"
    with pytest.raises(UsageError, match="R903"):
        toys(privacy={"epsilon": 0.01}, cohort={"size": 0.5, "sampling": "poisson"}).federation().run()


def test_the_communication_budget_is_a_limit(toys: Make) -> None:
    per_round = 6 * 2 * 16 / 1e6
    toy = toys(rounds=50, communication_budget_mb=3.5 * per_round)
    book, ended = toy.federation().run()
    assert ended == "communication" and book.server.rounds == 3
    with pytest.raises(UsageError, match="R903"):
        toys(communication_budget_mb=0.5 * per_round).federation().run()


BROKEN = {"nan": "not finite", "raise": "it did not want to", "shape": "shape", "nothing": "nothing"}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_client_is_left_out_and_reported(toys: Make, fault: str) -> None:
    toy = toys(faults=((2, fault),), cohort={"size": 1.0})
    toy.federation().run()
    rows = toy.run.metrics()
    assert all(row["clients"] == 9 and row["failed"] == 1 for row in rows)
    events = [event for event in toy.run.events() if event["kind"] == "client_failed"]
    assert len(events) == 5 and all(e["client"] == 2 and BROKEN[fault] in e["reason"] for e in events)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]


def test_too_many_broken_clients_fail_the_run(toys: Make) -> None:
    half = tuple((client, "nan") for client in range(6))
    with pytest.raises(RunFailed, match="6 of 10 clients failed in round 1: client 0") as caught:
        toys(faults=half, cohort={"size": 1.0}).federation().run()
    assert caught.value.id == "R920"
    toys(faults=half, cohort={"size": 1.0, "max_failed": 0.7}).federation().run()
    everybody = tuple((client, "raise") for client in range(10))
    with pytest.raises(RunFailed, match="10 of 10"):
        toys(faults=everybody, cohort={"size": 1.0, "max_failed": 1.0}).federation().run()
    with pytest.raises(RunFailed, match="R921"):
        toys(faults=half, cohort={"size": 1.0, "max_failed": 0.7, "minimum": 5}).federation().run()
    with pytest.raises(RunFailed, match="R920"):
        toys(faults=half, strategy="fedbuff", buffer=4).federation().run()
    with pytest.raises(UsageError, match="R911"):
        toys(privacy={"adaptive": True, "count_stddev": 0.1}, cohort={"sampling": "poisson"}).federation().run()


def test_over_selection_ends_with_the_clients_that_were_wanted(toys: Make) -> None:
    toy = toys(cohort={"size": 4, "over_selection": 1.0}, pack_size=2)
    toy.federation().run()
    assert all(row["cohort"] == 8 and row["clients"] == 4 and row["late"] == 4 for row in toy.run.metrics())


def test_an_empty_cohort_of_coins_changes_nothing(toys: Make) -> None:
    toy = toys(cohort={"size": 0.02, "sampling": "poisson"}, rounds=12)
    toy.federation().run()
    empty = [row for row in toy.run.metrics() if row["cohort"] == 0]
    assert empty and all("loss" not in row for row in empty)


def test_learning_rates_over_the_rounds(toys: Make) -> None:
    for schedule, expected in (
        ("constant", [0.1, 0.1, 0.1]),
        ("linear", [0.1, 0.06, 0.02]),
        ("cosine", [0.1, 0.06, 0.02]),
    ):
        toy = toys(lr_schedule=schedule, min_learning_rate=0.02, rounds=5)
        found = [toy.federation().learning_rate(number) for number in (1, 3, 5)]
        assert found == pytest.approx(expected)
    cosine = toys(lr_schedule="cosine", min_learning_rate=0.02, rounds=5).federation()
    assert cosine.learning_rate(2) == pytest.approx(0.02 + 0.08 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_federated_evaluation_is_weighted_and_shows_the_worst(toys: Make) -> None:
    toy = toys(evaluate={"holdout": 0.5, "every": 2}, rounds=5)
    toy.federation().run()
    rows = toy.run.metrics()
    assert [row["round"] for row in rows if "federated_loss" in row] == [2, 4, 5]
    losses = [event["losses"] for event in toy.run.events() if event["kind"] == "evaluation"][-1]
    values = {int(client): loss for client, loss in losses.items()}
    sizes = {client: len(points(client)[0]) for client in values}
    mean = sum(sizes[c] * values[c] for c in values) / sum(sizes.values())
    assert rows[-1]["federated_loss"] == pytest.approx(mean)
    assert rows[-1]["federated_worst_decile"] == pytest.approx(max(values.values()))


def test_other_settings_cannot_go_on_with_a_run(toys: Make) -> None:
    toy = toys()
    book, _ = toy.federation().run()
    check_same(book, Federate(**(toy.federate | {"rounds": 9})), "toy")
    with pytest.raises(UsageError, match="strategy: 'fedavg' -> 'fedadam'") as caught:
        check_same(book, Federate(**(toy.federate | {"strategy": "fedadam", "aggregation": "fedit"})), "toy")
    assert caught.value.id == "R930"
    with pytest.raises(UsageError, match="pack_size"):
        check_same(book, Federate(**(toy.federate | {"pack_size": 4})), "toy")


def test_a_damaged_round_is_told(toys: Make) -> None:
    toy = toys()
    toy.federation().run()
    Path(toy.run.path, "rounds", "5", "server.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RayftError, match="R931"):
        toy.federation().run()


def test_the_driver_holds_what_the_tree_holds(toys: Make) -> None:
    """200 blocks: sums of at most about log2 of them are there at once."""
    toy = toys(population=200, pack_size=1, cohort={"size": 1.0}, rounds=1)
    book, _ = toy.federation().run()
    assert book.row["clients"] == 200
