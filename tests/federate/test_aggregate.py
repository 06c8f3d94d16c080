"""Identities of aggregation, what it refuses, and its independence from blocks and order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rayft.config.federate import STRATEGIES, Federate
from rayft.errors import UsageError
from rayft.federate.aggregate import aggregate, buffered, finish, join, partial
from rayft.federate.messages import Answer, Partial, Server
from rayft.federate.preflight import Room, refuse
from rayft.federate.robust import krum
from rayft.federate.state import difference, norm
from rayft.federate.tree import Tree, joined
from tests.federate.conftest import adapter, answers, dense_deployed, farthest, setting


def vector(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def client(number: int, *values: float, examples: int = 1) -> Answer:
    return Answer(number, vector(*values), examples)


START = Server(vector(1.0, -2.0))
FOUR = [client(0, 1.5, -2.0, examples=1), client(1, 0.5, -1.0, examples=3), client(2, 2.0, 0.0), client(3, 1.0, -3.0)]


def fedavg(*clients: Answer, **federate: Any) -> torch.Tensor:
    return aggregate(setting(**federate), START, list(clients))[0].state["w"]


@pytest.mark.parametrize(
    "same",
    [
        {"strategy": "fedprox"},  # mu acts on the clients
        {"strategy": "fedavgm", "server_momentum": 0.0},
        {"strategy": "scaffold"},  # no control variates sent
        {"strategy": "trimmed_mean", "trim": 0.0, "weights": "uniform"},
        {"strategy": "multi_krum", "selected": 4},
    ],
    ids=str,
)
def test_what_is_fedavg_by_another_name(same: dict[str, Any]) -> None:
    uniform = same.get("strategy") == "trimmed_mean"
    expected = fedavg(*FOUR, weights="uniform" if uniform else "auto")
    assert torch.allclose(fedavg(*FOUR, **same), expected, rtol=0, atol=1e-15)


def test_privacy_without_noise_and_clip_is_fedavg() -> None:
    privacy = {"noise_multiplier": 0.0, "clip": None}
    found = fedavg(*FOUR, privacy=privacy)
    assert torch.allclose(found, fedavg(*FOUR, weights="uniform"), rtol=0, atol=1e-15)


def test_fedbuff_without_staleness_is_fedavg() -> None:
    federate = Federate(strategy="fedbuff", buffer=4)
    changes = [(difference(answer.state, START.state), 0) for answer in FOUR]
    server, metrics = buffered(federate, START, changes)
    assert torch.allclose(server.state["w"], fedavg(*FOUR, weights="uniform"), rtol=0, atol=1e-15)
    assert metrics["staleness"] == 0


def test_a_stale_update_counts_less() -> None:
    federate = Federate(strategy="fedbuff", buffer=2)
    server, _ = buffered(federate, START, [(vector(1.0, 0.0), 0), (vector(0.0, 1.0), 3)])
    assert torch.allclose(server.state["w"], torch.tensor([1.5, -1.75], dtype=torch.float64), rtol=0, atol=1e-15)


def test_one_client_is_taken_over() -> None:
    found = fedavg(client(0, 0.3, 0.7, examples=5))
    assert torch.allclose(found, vector(0.3, 0.7)["w"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ["svd", "fedex", "flora", "fedit", "hetlora"])
def test_the_order_of_clients_does_not_matter(method: str) -> None:
    clients = answers(7)
    expected, known = aggregate(setting(aggregation=method, pack_size=2), Server(adapter()), clients)
    shuffled = list(clients)
    random.Random(1).shuffle(shuffled)
    found, metrics = aggregate(setting(aggregation=method, pack_size=2), Server(adapter()), shuffled)
    assert metrics == known
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())


@pytest.mark.parametrize("method", ["svd", "fedex", "flora", "fedit", "hetlora"])
def test_blocks_change_rounding_only(method: str) -> None:
    clients = answers(7)
    expected, _ = aggregate(setting(aggregation=method, pack_size=7), Server(adapter()), clients)
    found, _ = aggregate(setting(aggregation=method, pack_size=2), Server(adapter()), clients)
    assert farthest(dense_deployed(found), dense_deployed(expected)) < 1e-12


def test_the_tree_joins_the_same_pairs_in_any_order() -> None:
    def pair(one: str, other: str) -> str:
        return f"({one}{other})"

    for count in range(1, 18):
        expected = joined(map(str, range(count)), pair)
        for seed in range(3):
            order = list(range(count))
            random.Random(seed).shuffle(order)
            tree = Tree[str](count, pair)
            for number in order:
                tree.add(number, str(number))
            assert tree.result() == expected
    tree = Tree[str](64, pair)
    held = []
    for number in range(64):
        tree.add(number, "x")
        held.append(tree.held)
    assert max(held) <= 7, "parts in order are held log2(count) at a time"
    with pytest.raises(ValueError, match="does not fit"):
        tree.add(64, "x")
    with pytest.raises(ValueError, match="missing"):
        Tree[str](2, pair).result()


def test_scaffold_moves_the_control_variate_by_the_share_that_took_part() -> None:
    """c <- c + |S| / N x mean(c_k+ - c_k)."""
    moved = [
        Answer(n, vector(1.0, 1.0), 2, control=vector(*values)) for n, values in enumerate([(1.0, 0.0), (3.0, 2.0)])
    ]
    server, _ = aggregate(setting(strategy="scaffold", population=8), START, moved)
    assert torch.equal(server.control["w"], torch.tensor([0.5, 0.25], dtype=torch.float64))


def test_bf16_messages_are_summed_in_fp64() -> None:
    found = fedavg(client(0, 1.001, -2.0), client(1, 1.003, -2.0), wire="bf16")
    expected = (torch.tensor([1.001, -2.0]).bfloat16().double() + torch.tensor([1.003, -2.0]).bfloat16().double()) / 2
    assert torch.allclose(found, expected, rtol=0, atol=1e-15) and not torch.equal(found, fedavg(*FOUR))


BROKEN = {
    "not finite": client(9, float("nan"), 0.0),
    "shape": Answer(9, {"w": torch.zeros(3)}, 1),
    "nothing": Answer(9, {}, 1),
    "returned no w": Answer(9, {"v": torch.zeros(2)}, 1),
    "nobody asked": Answer(9, {**vector(1.0, 1.0), "v": torch.zeros(2)}, 1),
    "no examples": client(9, 1.0, 1.0, examples=0),
    "it said so": Answer(9, error="it said so"),
    "control variate": Answer(9, vector(1.0, 1.0), 1, control=vector(float("inf"), 0.0)),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_answer_is_left_out_and_named(reason: str) -> None:
    found = partial(setting(), START, [*FOUR, BROKEN[reason]])
    (failed,) = found.failed
    assert failed[0] == 9 and reason in failed[1]
    clean = partial(setting(), START, FOUR)
    assert found.clients == clean.clients and torch.equal(found.sums["w"], clean.sums["w"])


def test_a_round_without_answers_changes_nothing() -> None:
    server, metrics = finish(setting(), START, Partial())
    assert server.rounds == 1 and torch.equal(server.state["w"], START.state["w"]) and not metrics


def test_a_change_of_length_zero_is_an_answer() -> None:
    """Flower 1.42 divides by it."""
    still = client(0, 1.0, -2.0)
    privacy = {"noise_multiplier": 0.0, "clip": 0.5}
    assert torch.allclose(
        fedavg(still, client(1, 1.4, -2.0), population=2, privacy=privacy)[0], torch.tensor(1.2).double()
    )


def test_krum_takes_the_client_in_the_crowd() -> None:
    crowd = [vector(1.0, 0.0), vector(1.1, 0.0), vector(0.9, 0.1), vector(1.0, 0.1)]
    states = [vector(50.0, 50.0), *crowd]
    assert krum(states, 1, 1)[0] in (1, 2, 4)
    assert krum(states, 1, 4) == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="R910"):
        krum(states[:3], 1, 1)


@pytest.mark.parametrize("strategy", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_robust_strategies_hold_against_one_attacker(strategy: str) -> None:
    crowd = [client(n, 1 + 0.01 * n, -2.0) for n in range(6)]
    attacker = client(6, 1e6, -1e6, examples=1000)
    moved = fedavg(*crowd, attacker, strategy=strategy, byzantine=1)
    assert norm({"w": moved - START.state["w"]}) < 0.1
    assert norm({"w": fedavg(*crowd, attacker) - START.state["w"]}) > 1e5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "fedadam", "aggregation": "svd"}, "space of the factors"),
    ({"strategy": "krum", "aggregation": "flora"}, "space of the factors"),
    ({"strategy": "scaffold", "aggregation": "rolora"}, "control variates"),
    ({"aggregation": "ffa", "ranks": [2, 4]}, "different rank"),
    ({"aggregation": "fedit", "ranks": [2, 4]}, "different rank"),
    ({"privacy": {}, "weights": "examples"}, "count alike"),
    ({"privacy": {}, "aggregation": "flora"}, "own factors"),
    ({"privacy": {}, "aggregation": "svd"}, "own factors"),
    ({"privacy": {}, "strategy": "median"}, "calibrated to a sum"),
    ({"privacy": {}, "strategy": "scaffold"}, "unprotected"),
    ({"privacy": {}, "strategy": "fedbuff"}, "privacy needs rounds"),
    ({"privacy": {"clip": None}}, "clip is null"),
    ({"privacy": {"mode": "local", "adaptive": True}}, "noisy count"),
    ({"privacy": {}, "cohort": {"over_selection": 0.5}}, "accountant assumes"),
    ({"cohort": {"sampling": "poisson", "over_selection": 0.5}}, "no fixed number"),
    ({"local_steps": 3, "local_epochs": 1.0}, "not both"),
    ({"optimizer_state": "keep"}, "replace every round"),
    ({"strategy": "fedbuff", "aggregation": "rolora"}, "same factor"),
    ({"bias_correction": "flwr"}, "belongs to fedadam"),
    ({"selected": 3}, "multi_krum"),
    ({"strategy": "fedadm"}, "did you mean fedadam"),
    ({"aggregation": "fedxe"}, "did you mean fedex"),
    ({"ranks": [0]}, "1 or more"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=lambda item: str(item)[:60])
def test_what_does_not_go_together_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Federate(**settings)


def test_defaults_choose_what_fits() -> None:
    assert Federate().method == "svd" and Federate().weighted
    assert Federate(privacy={}).method == "ffa" and not Federate(privacy={}).weighted
    for strategy in STRATEGIES:
        method = Federate(strategy=strategy).method
        assert method == ("svd" if strategy in ("fedavg", "fedprox") else "fedit")


def test_a_preset_is_the_published_setting_and_yields_to_keys() -> None:
    general = Federate(preset="flowertune-general")
    assert (general.clients, general.cohort.size, general.rounds, general.local_steps) == (20, 0.1, 200, 10)
    assert general.communication_budget_mb == 200_000 and general.method == "fedit"
    mine = Federate(preset="openfedllm", rounds=3, cohort={"sampling": "poisson"})
    assert (mine.rounds, mine.cohort.size, mine.cohort.sampling) == (3, 2, "poisson")
    assert Federate(preset="openfedllm", local_epochs=1.0).local_steps is None


def test_a_block_that_does_not_fit_is_told_how_many_do() -> None:
    room = Room(free=10e9, base=4 * 10**9, client=10**9)
    refuse(room, 7, 1, "cpu")
    with pytest.raises(UsageError, match=r"R905.*12.0 GB.*10.0 GB") as caught:
        refuse(room, 9, 1, "gpu")
    assert caught.value.hint == "federate.pack_size=7"
    with pytest.raises(UsageError, match="shared by 2 workers"):
        refuse(Room(free=1e9, base=4 * 10**9, client=10**9), 1, 2, "cpu")


def test_joining_keeps_what_each_part_knows() -> None:
    one, two = (partial(setting(), START, [c]) for c in FOUR[:2])
    both = join(one, two)
    assert both.clients == (0, 1) and both.weight == 4.0 and both.facts["examples"] == 4.0
