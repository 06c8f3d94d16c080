"""LoRA aggregation against dense sums and against PEFT's own way to add adapters up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rayft.federate import lora
from rayft.federate.aggregate import aggregate
from rayft.federate.factors import a_name, b_name, decomposed, narrowed, truncated
from rayft.federate.messages import Alphas, Answer, Server
from rayft.federate.start import fresh_a, start
from tests.federate.conftest import (
    MODULES,
    adapter,
    answers,
    dense,
    dense_deployed,
    dense_mean,
    farthest,
    setting,
)

DEPLOYED = Alphas(1.0)


def sharing_a(clients: list[Answer], server: Server) -> list[Answer]:
    """As under ffa: only B is sent."""
    return [
        Answer(c.client, {name: t for name, t in c.state.items() if ".lora_B" in name}, c.examples) for c in clients
    ]


@pytest.mark.parametrize("method", ["svd", "fedex", "flora"])
def test_the_deployed_sum_is_the_dense_mean(method: str) -> None:
    server = Server(adapter())
    clients = answers(5)
    for number in (1, 2):
        before = dense_deployed(Server(adapter(size=0.0), server.accumulator))
        expected = {module: before[module] + value for module, value in dense_mean(clients).items()}
        server, metrics = aggregate(setting(number, aggregation=method, pack_size=2), server, clients)
        assert farthest(dense_deployed(server), expected) < 1e-12
        assert metrics["gap"] < 1e-12
        clients = [Answer(c.client, adapter(seed=200 + c.client), c.examples) for c in clients]


@pytest.mark.parametrize("method", ["svd", "fedex", "flora"])
def test_the_rounding_of_factors_is_in_the_residual(method: str) -> None:
    """fp32 factors: the accumulator is fp64, and holds what rounding took away."""
    clients = answers(5, dtype=torch.float32)
    server, metrics = aggregate(setting(aggregation=method), Server(adapter(dtype=torch.float32)), clients)
    assert farthest(dense_deployed(server), dense_mean(clients)) < 1e-12
    assert all(tensor.dtype == torch.float32 for tensor in server.state.values())
    assert metrics["gap"] < 1e-12


def test_ffa_is_exact_and_keeps_a() -> None:
    server = Server(adapter())
    clients = sharing_a(answers(5), server)
    after, metrics = aggregate(setting(aggregation="ffa"), server, clients)
    whole = [Answer(c.client, {**server.state, **c.state}, c.examples) for c in clients]
    assert farthest(dense_deployed(after), dense_mean(whole)) < 1e-12
    assert all(torch.equal(after.state[a_name(m)], server.state[a_name(m)]) for m in MODULES)
    assert metrics["gap"] < 1e-12


def test_ffa_is_flora_with_a_shared_a() -> None:
    server = Server(adapter())
    clients = sharing_a(answers(4), server)
    whole = [Answer(c.client, {**server.state, **c.state}, c.examples) for c in clients]
    ffa, _ = aggregate(setting(aggregation="ffa"), server, clients)
    flora, _ = aggregate(setting(aggregation="flora"), server, whole)
    assert farthest(dense_deployed(ffa), dense_deployed(flora)) < 1e-12


def test_rolora_is_exact_in_rounds_of_either_kind() -> None:
    server = Server(adapter())
    for number, letter in ((1, "B"), (2, "A"), (3, "B")):
        clients = [
            Answer(n, {k: t for k, t in adapter(seed=40 * number + n).items() if f".lora_{letter}" in k}, 2 + n)
            for n in range(4)
        ]
        whole = [Answer(c.client, {**server.state, **c.state}, c.examples) for c in clients]
        server, metrics = aggregate(setting(number, aggregation="rolora"), server, clients)
        assert farthest(dense_deployed(server), dense_mean(whole)) < 1e-12
        assert metrics["gap"] < 1e-12


def test_fedit_shows_its_gap() -> None:
    clients = answers(5)
    server, metrics = aggregate(setting(aggregation="fedit", pack_size=2), Server(adapter()), clients)
    exact, deployed = dense_mean(clients), dense_deployed(server)
    lost = sum(float((exact[m] - deployed[m]).square().sum()) for m in MODULES) ** 0.5
    whole = sum(float(exact[m].square().sum()) for m in MODULES) ** 0.5
    assert metrics["gap"] == pytest.approx(lost / whole, rel=1e-10) and metrics["gap"] > 0.1
    total = sum(c.examples for c in clients)
    for name in server.state:
        mean = sum(c.examples / total * c.state[name] for c in clients)
        assert torch.allclose(server.state[name], mean, rtol=0, atol=1e-12)


def test_equal_clients_leave_no_gap() -> None:
    clients = [Answer(n, adapter(seed=5), 3) for n in range(4)]
    for method in ("fedit", "svd", "fedex", "flora"):
        server, metrics = aggregate(setting(aggregation=method), Server(adapter()), clients)
        assert metrics["gap"] < 1e-12
        assert farthest(dense_deployed(server), dense(adapter(seed=5))) < 1e-12


def test_svd_without_residual_is_the_best_of_its_rank() -> None:
    """FlexLoRA, against the dense SVD."""
    clients = answers(5)
    server, metrics = aggregate(setting(aggregation="svd", residual=False), Server(adapter()), clients)
    assert not server.accumulator
    lost = whole = 0.0
    for module, exact in dense_mean(clients).items():
        U, S, V = torch.linalg.svd(exact, full_matrices=False)
        best = (U[:, :3] * S[:3]) @ V[:3]
        assert float((dense_deployed(server)[module] - best).abs().max()) < 1e-12
        lost, whole = lost + float(S[3:].square().sum()), whole + float(S.square().sum())
    assert metrics["gap"] == pytest.approx((lost / whole) ** 0.5, rel=1e-10)


def test_a_truncated_accumulator_reports_its_error() -> None:
    clients = answers(5)
    server, metrics = aggregate(setting(aggregation="svd", accumulator_rank=2), Server(adapter()), clients)
    assert {B.shape[1] for B, _ in server.accumulator.values()} == {2} and metrics["accumulator_rank"] == 2
    exact, deployed = dense_mean(clients), dense_deployed(server)
    lost = sum(float((exact[m] - deployed[m]).square().sum()) for m in MODULES) ** 0.5
    whole = sum(float(exact[m].square().sum()) for m in MODULES) ** 0.5
    assert metrics["gap"] == pytest.approx(lost / whole, rel=1e-9) and 0 < metrics["truncation_error"] < 1


@pytest.mark.parametrize("method", ["svd", "flora"])
def test_clients_of_different_rank(method: str) -> None:
    ranks = (1, 3, 2)
    clients = [Answer(n, adapter(ranks[n % 3], seed=n), 2 + n) for n in range(5)]
    server, metrics = aggregate(setting(aggregation=method, ranks=ranks), Server(adapter()), clients)
    assert farthest(dense_deployed(server), dense_mean(clients)) < 1e-12 and metrics["gap"] < 1e-12


def test_a_smaller_rank_begins_with_the_leading_components() -> None:
    """After a round of svd the components are sorted, so a client of rank 2 has the best approximation of rank 2."""
    server, _ = aggregate(setting(aggregation="svd"), Server(adapter()), answers(5))
    begun = start(setting(aggregation="svd").federate, server.state, Alphas(6.0), 2)
    for module, whole in dense(dict(server.state)).items():
        U, S, V = torch.linalg.svd(whole, full_matrices=False)
        assert float((dense(begun)[module] - (U[:, :2] * S[:2]) @ V[:2]).abs().max()) < 1e-12


def test_hetlora_weighs_padded_factors_by_their_products_norm() -> None:
    ranks = (1, 3)
    clients = [Answer(n, adapter(ranks[n % 2], seed=n), 2 + n) for n in range(4)]
    server, _ = aggregate(setting(aggregation="hetlora", ranks=ranks), Server(adapter()), clients)
    norms = [sum(float(p.square().sum()) for p in dense(dict(c.state)).values()) ** 0.5 for c in clients]
    for module, (d, k) in MODULES.items():
        A, B = torch.zeros(3, k, dtype=torch.float64), torch.zeros(d, 3, dtype=torch.float64)
        for client, norm in zip(clients, norms, strict=True):
            rank = len(client.state[a_name(module)])
            A[:rank] += norm / sum(norms) * client.state[a_name(module)]
            B[:, :rank] += norm / sum(norms) * client.state[b_name(module)] * (3 / rank)
        assert torch.allclose(server.state[a_name(module)], A, rtol=0, atol=1e-12)
        assert torch.allclose(server.state[b_name(module)], B, rtol=0, atol=1e-12)


def test_fedsa_shares_a_only() -> None:
    server = Server(adapter())
    clients = [Answer(c.client, {k: t for k, t in c.state.items() if ".lora_A" in k}, c.examples) for c in answers(3)]
    after, metrics = aggregate(setting(aggregation="fedsa"), server, clients)
    assert "gap" not in metrics
    assert all(torch.equal(after.state[b_name(m)], server.state[b_name(m)]) for m in MODULES)
    assert not torch.equal(after.state[a_name("q")], server.state[a_name("q")])


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(10, 12, bias=False), nn.Linear(14, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x[..., :10]).sum() + self.v(x).sum()


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_peft_adds_adapters_to_the_same_product(combination: str) -> None:
    """flora against `cat`, svd without residual against `svd`."""
    ranks = (1, 3, 2)
    clients = [Answer(n, adapter(ranks[n], seed=n, dtype=torch.float32), 2 + n) for n in range(3)]
    model: Any = get_peft_model(Base(), LoraConfig(r=1, lora_alpha=6, target_modules=["q", "v"]), adapter_name="0")
    for n in (1, 2):
        model.add_adapter(str(n), LoraConfig(r=ranks[n], lora_alpha=6, target_modules=["q", "v"]))
    for n, client in enumerate(clients):
        for module in MODULES:
            layer = getattr(model.base_model.model, module)
            layer.lora_A[str(n)].weight.data.copy_(client.state[a_name(module)])
            layer.lora_B[str(n)].weight.data.copy_(client.state[b_name(module)])
    total = sum(c.examples for c in clients)
    options = {"svd_rank": 3} if combination == "svd" else {}
    model.add_weighted_adapter(
        ["0", "1", "2"], [c.examples / total for c in clients], "sum", combination_type=combination, **options
    )
    method: dict[str, Any] = (
        {"aggregation": "flora"} if combination == "cat" else {"aggregation": "svd", "residual": False}
    )
    server, _ = aggregate(setting(ranks=ranks, **method), Server(adapter()), clients)
    for module, ours in dense_deployed(server).items():
        theirs = getattr(model.base_model.model, module).get_delta_weight("sum")
        assert float((ours - theirs).abs().max()) < (1e-5 if combination == "svd" else 2e-6)


def test_the_deployed_adapter_is_one_plain_adapter() -> None:
    server, _ = aggregate(setting(aggregation="svd"), Server(adapter()), answers(5))
    tensors = lora.deployed(server, Alphas(6.0))
    ranks = {len(t) for name, t in tensors.items() if ".lora_A" in name}
    assert len(ranks) == 1
    own = {m: tensors[b_name(m)].double() @ tensors[a_name(m)].double() for m in MODULES}
    assert farthest(own, dense_deployed(server)) < 1e-5


def test_flora_begins_anew_with_every_round() -> None:
    first, _ = aggregate(setting(1, aggregation="flora"), Server(adapter()), answers(3))
    second, _ = aggregate(setting(2, aggregation="flora"), first, answers(3))
    for module in MODULES:
        assert not torch.count_nonzero(first.state[b_name(module)])
        assert not torch.equal(first.state[a_name(module)], second.state[a_name(module)])
    drawn = fresh_a(200, 400, 1, 1, "m")
    assert float(drawn.abs().max()) <= 1 / 20 and float(drawn.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.01)


def test_the_svd_of_factors_is_that_of_the_matrix() -> None:
    draw = torch.Generator().manual_seed(1)
    for rank in (2, 7, 30):
        B = torch.randn(9, rank, generator=draw, dtype=torch.float64)
        A = torch.randn(rank, 11, generator=draw, dtype=torch.float64)
        U, S, V = decomposed((B, A))
        assert torch.allclose((U * S) @ V, B @ A, rtol=0, atol=1e-11)
        assert torch.allclose(S, torch.linalg.svdvals(B @ A)[: len(S)], rtol=0, atol=1e-11)
        thin = narrowed((B, A))
        assert thin[0].shape[1] <= 9 and torch.allclose(thin[0] @ thin[1], B @ A, rtol=0, atol=1e-12)
        _, error = truncated((B, A), 2)
        assert error == pytest.approx(float(S[2:].square().sum().sqrt()), abs=1e-11)
