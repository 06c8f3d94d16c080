"""Strategies give the numbers of Flower 1.42, and epsilon those of dp-accounting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayft.federate.aggregate import aggregate
from rayft.federate.messages import Answer, Server
from rayft.federate.partition import dirichlet
from rayft.federate.privacy import Release, epsilon
from tests.federate.conftest import setting

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "flwr_1_42_golden.json").read_text())["strategies"]
SETTINGS: dict[str, dict[str, Any]] = {
    "FedAvg": {"strategy": "fedavg"},
    "FedAvgM(lr=0.7,m=0.9)": {"strategy": "fedavgm", "server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdam": {"strategy": "fedadam", "bias_correction": "flwr"},
    "FedYogi": {"strategy": "fedyogi", "bias_correction": "flwr"},
    "FedAdagrad": {"strategy": "fedadagrad", "bias_correction": "flwr"},
    "FedMedian": {"strategy": "median"},
    "FedTrimmedAvg": {"strategy": "trimmed_mean"},
}


def tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in arrays.items()}


@pytest.mark.parametrize("pack_size", [1, 2, 8])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_strategy_gives_flowers_numbers(name: str, pack_size: int) -> None:
    rounds = GOLDEN[name]
    server = Server(tensors(rounds[0]["global"]))
    for number, known in enumerate(rounds, start=1):
        answers = [Answer(k, tensors(c["arrays"]), examples=c["n"]) for k, c in enumerate(known["clients"])]
        server, _ = aggregate(setting(number, **SETTINGS[name], pack_size=pack_size), server, answers)
        for key, value in tensors(known["out"]).items():
            assert float((server.state[key] - value).abs().max()) <= 1e-12, (number, key)


def test_without_flowers_correction_fedadam_is_another_one() -> None:
    """The flag decides: the paper's v starts at tau^2 and is not corrected."""
    known = GOLDEN["FedAdam"][0]
    answers = [Answer(k, tensors(c["arrays"]), examples=c["n"]) for k, c in enumerate(known["clients"])]
    begun = tensors(known["global"])
    server, _ = aggregate(setting(1, strategy="fedadam"), Server(begun), answers)
    weights = np.array([answer.examples for answer in answers], dtype=float)
    mean = sum(w * a.state["a"] for w, a in zip(weights / weights.sum(), answers, strict=True))
    delta = mean - begun["a"]
    v = 0.99 * 1e-6 + 0.01 * delta**2
    assert torch.allclose(server.state["a"], begun["a"] + 0.1 * 0.1 * delta / (v.sqrt() + 1e-3), rtol=0, atol=1e-14)


EPSILONS = [
    (1000, 100, 1.0, 100, 1e-5, 7.046603, 83.936917),
    (1000, 10, 1.0, 200, 1e-5, 0.912476, 12.298719),
    (20, 2, 1.0, 200, 1e-3, 7.096154, 153.142033),
    (100, 20, 1.5, 50, 1e-5, 5.259771, 29.503075),
    (10000, 100, 0.8, 1000, 1e-6, 3.706190, 111.009104),
]
"""(clients, cohort, z, rounds, delta, epsilon with Poisson sampling, epsilon with fixed size)."""


@pytest.mark.parametrize("row", EPSILONS, ids=str)
def test_epsilon_is_that_of_dp_accounting(row: tuple[Any, ...]) -> None:
    clients, cohort, z, rounds, delta, poisson, fixed = row
    for sampling, expected in (("poisson", poisson), ("fixed", fixed)):
        releases = [Release(number, z, sampling, clients, cohort) for number in range(rounds)]
        assert epsilon(releases, delta) == pytest.approx(expected, abs=1e-6)


def test_local_privacy_is_composed_without_sampling() -> None:
    """Twice the clip between any two changes: half of the multiplier, whatever the cohort."""
    import dp_accounting

    releases = [Release(number, 8.0, "local", 100, 5) for number in range(10)]
    exact = dp_accounting.get_epsilon_gaussian(4.0 / 10**0.5, 1e-5)
    assert epsilon(releases, 1e-5) == pytest.approx(exact, rel=1e-3)


DIRICHLET = json.loads((HERE / "flwr_datasets_golden.json").read_text())


@pytest.mark.parametrize("known", DIRICHLET["splits"], ids=lambda known: f"seed-{known['seed']}")
def test_dirichlet_gives_the_indices_of_flwr_datasets(known: dict[str, Any]) -> None:
    found = dirichlet(
        DIRICHLET["labels"],
        known["num_partitions"],
        known["alpha"],
        known["seed"],
        known["min_partition_size"],
        self_balancing=known["self_balancing"],
    )
    assert found == known["indices"]
