"""Clipping, noise, the adaptive norm, and a budget that is never exceeded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rayft.config.federate import Federate
from rayft.errors import UsageError
from rayft.federate.aggregate import aggregate
from rayft.federate.messages import Answer, Server
from rayft.federate.noise import Noise, secure_normal
from rayft.federate.privacy import (
    Ledger,
    clipped,
    denominator,
    next_clip,
    noise_multiplier,
)
from rayft.federate.sample import cohort
from rayft.federate.state import norm
from tests.federate.conftest import setting


def private(population: int = 100, size: float = 0.2, **privacy: Any) -> Federate:
    return Federate(privacy=privacy, cohort={"size": size, "sampling": "poisson"}, clients=population)


def two(x: float, y: float) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([x], dtype=torch.float64), "b": torch.tensor([y], dtype=torch.float64)}


def test_clipping_is_over_all_tensors_together() -> None:
    change, unclipped = clipped(two(3.0, 4.0), 1.0)
    assert norm(change) == pytest.approx(1.0) and unclipped == 0
    assert float(change["a"] / change["b"]) == pytest.approx(0.75)
    assert clipped(two(0.3, 0.4), 1.0)[1] == 1
    assert norm(clipped(two(0.0, 0.0), 1.0)[0]) == 0.0


def test_the_noise_has_the_length_that_the_accountant_assumes() -> None:
    """Many numbers, no signal: the spread of the result is z C / (q N), also when clients drop out."""
    count = 20_000
    begun = Server({"w": torch.zeros(count, dtype=torch.float64)}, clip=0.5)
    federate = {
        "privacy": {"noise_multiplier": 2.0, "clip": 0.5, "noise_seed": 1},
        "cohort": {"size": 0.2, "sampling": "poisson"},
    }
    for present in (0, 3, 20):
        answers = [Answer(n, begun.state, 1) for n in range(present)]
        server, _ = aggregate(setting(population=100, **federate), begun, answers, Noise(1))
        assert float(server.state["w"].std()) == pytest.approx(2.0 * 0.5 / 20, rel=0.02)


def test_one_client_moves_the_sum_by_the_clip_at_most() -> None:
    begun = Server({"w": torch.zeros(3, dtype=torch.float64)}, clip=0.5)
    federate = {"privacy": {"noise_multiplier": 0.0, "clip": 0.5}, "cohort": {"size": 0.2, "sampling": "poisson"}}
    huge = Answer(0, {"w": torch.full((3,), 1e6, dtype=torch.float64)}, examples=10**6)
    server, _ = aggregate(setting(population=100, **federate), begun, [huge])
    assert norm(server.state) == pytest.approx(0.5 / 20)


def test_local_noise_is_drawn_by_each_client() -> None:
    count = 20_000
    begun = Server({"w": torch.zeros(count, dtype=torch.float64)}, clip=0.5)
    federate = {"privacy": {"mode": "local", "noise_multiplier": 2.0, "clip": 0.5}}
    server, _ = aggregate(setting(**federate), begun, [Answer(n, begun.state, 1) for n in range(4)], Noise())
    assert float(server.state["w"].std()) == pytest.approx(2.0 * 0.5 / 2, rel=0.03), "4 clients: half of each one's"


def test_the_adaptive_norm_moves_the_right_way() -> None:
    """Flower 1.42 runs backwards: it shrinks when all changes are longer."""
    federate = private(adaptive=True, noise_multiplier=0.0, clip=0.1)
    grown = next_clip(federate, 0.1, unclipped=0, population=100, noise=Noise(1))
    shrunk = next_clip(federate, 0.1, unclipped=20, population=100, noise=Noise(1))
    assert grown == pytest.approx(0.1 * math.exp(0.2 * 0.5)) and shrunk == pytest.approx(0.1 * math.exp(-0.2 * 0.5))


def test_the_adaptive_norm_finds_the_quantile() -> None:
    lengths = np.random.default_rng(0).lognormal(1.0, 0.5, size=200)
    clip = 0.1
    federate = private(200, 1.0, adaptive=True, noise_multiplier=1.0, clip=clip)
    for number in range(150):
        clip = next_clip(federate, clip, int((lengths <= clip).sum()), 200, Noise(3, number))
    assert clip == pytest.approx(float(np.median(lengths)), rel=0.2)


def test_aggregation_measures_the_norm_that_was_used_and_sets_the_next() -> None:
    federate = {
        "privacy": {"noise_multiplier": 1.0, "clip": 0.1, "adaptive": True, "noise_seed": 1, "count_stddev": 5.0},
        "cohort": {"size": 1.0, "sampling": "poisson"},
    }
    begun = Server({"w": torch.zeros(2, dtype=torch.float64)}, clip=0.1)
    far = [Answer(n, {"w": torch.full((2,), 30.0, dtype=torch.float64)}, 1) for n in range(100)]
    server, metrics = aggregate(setting(population=100, **federate), begun, far, Noise(1))
    assert metrics["clip"] == 0.1 and server.clip is not None and server.clip > 0.1


@pytest.mark.parametrize(("population", "expected"), [(500, 1.005038), (100, 1.154701)])
def test_the_count_costs_a_little_more_noise(population: int, expected: float) -> None:
    """Cohorts of 100 and 20."""
    assert noise_multiplier(private(population, adaptive=True), population) == pytest.approx(expected, abs=1e-6)


def test_a_count_with_too_little_noise_is_refused() -> None:
    with pytest.raises(UsageError, match="R911"):
        noise_multiplier(private(10, adaptive=True, count_stddev=0.4), 10)


def test_the_denominator_is_fixed() -> None:
    assert denominator(private(100, 0.2), 100) == 20.0 and denominator(private(100, 7), 100) == 7.0


def ledger(federate: Federate, population: int) -> Ledger:
    assert federate.privacy is not None
    return Ledger(federate.privacy, population, [])


def test_the_budget_is_never_exceeded() -> None:
    federate = private(1000, 0.1, epsilon=2.0, delta=1e-5)
    book = ledger(federate, 1000)
    number = 1
    while book.allows(release := book.event(federate, number)):
        book.releases.append(release)
        number += 1
    assert book.epsilon() <= 2.0 < book.epsilon(book.event(federate, number))
    assert number > 2


def test_what_was_released_twice_costs_twice() -> None:
    federate = private(1000, 0.1, delta=1e-5)
    book = ledger(federate, 1000)
    once, twice = book.event(federate, 1), book.event(federate, 1)
    assert book.epsilon(once) < book.epsilon(once, twice)
    assert book.epsilon() == 0.0


def test_no_noise_is_no_privacy() -> None:
    federate = private(noise_multiplier=0.0)
    book = ledger(federate, 100)
    assert math.isinf(book.epsilon(book.event(federate, 1)))


def test_secure_noise_is_normal_and_never_the_same() -> None:
    drawn = secure_normal(100_000)
    assert abs(drawn.mean()) < 0.02 and drawn.std() == pytest.approx(1.0, rel=0.02)
    assert float((drawn**4).mean()) == pytest.approx(3.0, rel=0.1)
    assert not np.array_equal(secure_normal(5), secure_normal(5))
    assert torch.equal(Noise(1, 2).normal((3,), 1.0), Noise(1, 2).normal((3,), 1.0))
    assert not torch.equal(Noise(1, 2).normal((3,), 1.0), Noise(1, 3).normal((3,), 1.0))


def test_poisson_cohorts_have_the_expected_size_and_the_seed_decides() -> None:
    federate = Federate(cohort={"size": 0.25, "sampling": "poisson"})
    sizes = [len(cohort(federate, 400, 5, number)) for number in range(200)]
    assert np.mean(sizes) == pytest.approx(100, rel=0.03) and np.std(sizes) == pytest.approx(75**0.5, rel=0.15)
    assert cohort(federate, 400, 5, 1) == cohort(federate, 400, 5, 1) != cohort(federate, 400, 5, 2)
    hidden = private(400, 0.25)
    assert cohort(hidden, 400, 5, 1) != cohort(hidden, 400, 5, 1), "with privacy nobody can compute who took part"
    fixed = Federate(cohort={"size": 6, "over_selection": 0.5})
    assert len(cohort(fixed, 400, 5, 1)) == 9 and cohort(fixed, 400, 5, 1) == sorted(cohort(fixed, 400, 5, 1))
    assert cohort(Federate(), 5, 1, 1) == [0, 1, 2, 3, 4]
