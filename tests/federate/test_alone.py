"""Clients that train one at a time, by the step of `rayft train`: the weights themselves, and adapters of no pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayft.config import load
from rayft.data.examples import Selection
from rayft.errors import RunFailed, UsageError
from rayft.federate import dry_run, run
from rayft.federate.aggregate import Setting
from rayft.federate.alone import AloneLocal
from rayft.federate.books import read_book
from rayft.federate.clients import seed_of
from rayft.federate.messages import Server
from rayft.federate.state import norm
from rayft.federate.task import Block, Task, kept_file
from rayft.runs.folder import RunFolder
from rayft.runs.reference import resolve
from rayft.train import fit
from tests.federate.test_run import federated, job_of, quiet_until, write_tasks
from tests.train.conftest import Recipes

Federations = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.long

SGD = {"train.optim": "sgd", "train.max_grad_norm": 0.0, "train.learning_rate": 0.1}


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 chats, each of one of three tasks."""
    return write_tasks(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture
def federation(recipe: Recipes, tasks_file: str) -> Federations:
    """As in test_run.py, without an adapter unless one is given; keys without a dot belong to `federate`."""

    def make(adapter: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        plain = federated(recipe, tasks_file, 3, changes)
        del plain["adapter"]
        return plain if adapter is None else {**plain, "adapter": adapter}

    return make


def quiet(plain: dict[str, Any], **options: Any) -> Any:
    return run(plain, quiet=True, **options)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    (file,) = Path(folder).glob("*.safetensors")
    return load_file(file)


def base_of(plain: dict[str, Any]) -> dict[str, torch.Tensor]:
    return weights(plain["model"]["base"])


def alike(one: str, other: str) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_federation_of_whole_models_is_a_run(federation: Federations) -> None:
    plain = federation(evaluate={"holdout": 0.2})
    result = quiet(plain)
    assert result.kind == "model" and result.folder == f"{result.path}/model"
    folder = RunFolder.open(result.path)
    rows = folder.metrics()
    assert rows[1]["validation_loss"] < rows[0]["validation_loss"] and "gap" not in rows[0]
    assert {"loss", "federated_loss", "mb_up", "tokens"} <= rows[0].keys()
    numbers = sum(tensor.numel() for tensor in read_book(folder, 1).server.state.values())
    assert rows[0]["mb_up"] == pytest.approx(3 * 4 * numbers / 1e6) and numbers == sum(
        tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(plain["model"]["base"]).parameters()
    )
    assert alike(result.folder, f"{result.path}/rounds/{result.best}/model")
    storage = str(Path(result.path).parent)
    assert resolve("run:test", storage).kind == resolve("run:test@round-1", storage).kind == "model"
    assert not Path(result.path, "adapter").exists() and "Federation test" in Path(result.report).read_text()
    assert quiet(plain, mode="resume") == result, "a finished run is not run again"

    model = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).eval()
    prepared = next(Path(storage).glob(".cache/data/*/validation.arrow"))
    total = weight = 0.0
    for row in Selection(prepared, range(5)):
        ids, own = torch.tensor(row["input_ids"])[None].long(), torch.tensor(row["loss_weights"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total, weight = total + float((losses * own[1:]).sum()), weight + float(own.double().sum())
    assert total / weight == pytest.approx(result.metrics["validation_loss"], rel=2e-5)


KINDS: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"train.trainable": {"patterns": [r"layers\.3\."]}}),
    ({"rank": 4, "alpha": 8, "use_dora": True}, {}),
    ({"method": "ia3"}, {}),
]


@pytest.mark.parametrize(
    ("adapter", "more", "optim"),
    [(*kind, "sgd") for kind in KINDS] + [(*KINDS[0], "adamw"), (*KINDS[1], "adamw")],
    ids=str,
)
def test_one_client_is_central_training(
    federation: Federations,
    recipe: Recipes,
    tasks_file: str,
    adapter: dict[str, Any] | None,
    more: dict[str, Any],
    optim: str,
) -> None:
    """SGD: one step on all examples. AdamW: three steps of four, in the client's order; a run has one seed for that and
    for its adapter's start, so only whole models are compared. Both in fp32."""
    steps, batch = (1, 24) if optim == "sgd" else (3, 4)
    same = {"data.validation": None, "train.global_batch_size": batch, "train.micro_batch_size": 4, **more}
    same |= SGD if optim == "sgd" else {}
    fed = federation(adapter, name="fed", clients=1, rounds=1, local_steps=steps, **same)
    ours = weights(quiet(fed).folder)
    constant = {"train.max_steps": steps, "train.lr_scheduler_type": "constant", "train.warmup_steps": 0.0}
    plain = recipe(name="central", **{**same, "data.train": tasks_file, **constant})
    plain = {
        **{key: value for key, value in plain.items() if key != "adapter"},
        **({"adapter": adapter} if adapter else {}),
    }
    if adapter is not None:
        plain["adapter"] = adapter
    if adapter is None:
        plain["seed"] = seed_of(17, 0, 1)
    central = weights(fit(plain, answer=None, quiet=True).folder)
    assert ours.keys() == central.keys()
    for name, tensor in central.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-6), name
    begun = base_of(fed) if adapter is None else None
    moved = [name for name in ours if begun is None or not torch.equal(ours[name], begun[name])]
    assert moved and all("layers.3." in name for name in moved) == bool(more)
    if begun is not None:
        assert max(float((ours[name] - begun[name]).abs().max()) for name in moved) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "fedprox", "mu": 0.1, "aggregation": "fedit", "optimizer_state": "keep"},
        {"strategy": "fedadam", "wire": "bf16", "local_epochs": 0.5, "local_steps": None},
        {"strategy": "scaffold", **SGD},
        {"privacy": {"noise_seed": 1}, "cohort": {"size": 0.8, "sampling": "poisson"}},
        {"adapter": {"rank": 4, "use_dora": True}, "strategy": "fedavgm", "optimizer_state": "keep"},
    ],
    ids=str,
)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(federation: Federations, settings: dict[str, Any]) -> None:
    whole = quiet(federation(name="whole", rounds=3, **settings))
    parts = federation(name="parts", rounds=3, **settings)
    assert quiet_until(parts, 1) and quiet_until(parts, 2)
    result = quiet(parts, mode="resume")
    for number in (2, 3):
        kind = result.kind
        assert alike(f"{result.path}/rounds/{number}/{kind}", f"{whole.path}/rounds/{number}/{kind}")
    ours, theirs = (read_book(RunFolder.open(one.path), 3) for one in (result, whole))
    assert ours.row["loss"] == theirs.row["loss"] and ours.kept == theirs.kept
    if settings.get("optimizer_state") == "keep" or settings.get("strategy") == "scaffold":
        assert all(Path(kept_file(result.path, client, 3)).is_file() for client in range(3))


def test_one_and_two_actors_give_the_same_bits(federation: Federations, ray_cluster: str) -> None:
    paths = []
    for workers in (1, 2):
        plain = federation(name=f"on-{workers}", pack_size=1, **{"scale.workers": workers, "scale.cpus_per_worker": 1})
        paths.append(quiet(plain).path)
    for number in (1, 2):
        assert alike(*(f"{path}/rounds/{number}/model" for path in paths))
    first, second = (RunFolder.open(path).metrics() for path in paths)
    assert [row["validation_loss"] for row in first] == [row["validation_loss"] for row in second]
    assert (first[-1]["base_loads"], second[-1]["base_loads"]) == (1, 2)


@pytest.mark.parametrize("keep", [False, True])
def test_each_client_begins_with_the_servers_weights(federation: Federations, keep: bool) -> None:
    """A client's answer does not depend on who was trained before it on the same model, bit for bit."""
    plain = federation(optimizer_state="keep" if keep else "reset", aggregation="fedit", evaluate={"holdout": 0.2})
    result = quiet(plain)
    local = AloneLocal(job_of(plain, result))
    opening = local.open()
    federate = load(plain).recipe.federate
    assert federate is not None
    task = Task(Setting(federate, 1, opening.alphas, 3, 17), Server(opening.state), 1e-3)
    together = local.train(task, Block(0, (0, 1, 2)))
    for number in (2, 0, 1):
        (alone,) = local.train(task, Block(0, (number,)))
        assert not alone.error and alone.state.keys() == opening.state.keys()
        for name, tensor in alone.state.items():
            assert torch.equal(tensor, together[number].state[name]), name
        local.evaluate(task, Block(0, (number,)))
        assert alone.facts == together[number].facts
    assert any(not torch.equal(together[0].state[name], together[1].state[name]) for name in opening.state)


def test_fedprox_pulls_to_the_start_and_without_mu_is_fedavg(federation: Federations) -> None:
    settings = {"rounds": 1, "local_steps": 6, "aggregation": "fedit"}
    free = quiet(federation(name="free", strategy="fedprox", mu=0.0, **settings)).folder
    plain = federation(name="plain", **settings)
    assert alike(free, quiet(plain).folder)
    for name, clipped in (("clipped", {}), ("unclipped", {"train.max_grad_norm": 0.0})):
        near = quiet(federation(name=name, strategy="fedprox", mu=1e4, **settings, **clipped)).folder
        begun = base_of(plain)

        def moved(folder: str, begun: dict[str, torch.Tensor] = begun) -> float:
            return norm({key: tensor - begun[key] for key, tensor in weights(folder).items()})

        assert moved(near) < 0.7 * moved(free), name


def test_scaffold_corrects_from_the_second_round_on(federation: Federations) -> None:
    corrected = quiet(federation(name="corrected", strategy="scaffold", weights="uniform", **SGD)).path
    plain = quiet(federation(name="plain", weights="uniform", **SGD)).path
    assert alike(f"{corrected}/rounds/1/model", f"{plain}/rounds/1/model")
    assert not alike(f"{corrected}/rounds/2/model", f"{plain}/rounds/2/model")
    assert norm(read_book(RunFolder.open(corrected), 1).server.control) > 0


def test_a_client_that_diverges_is_left_out(federation: Federations, tmp_path: Path) -> None:
    """The loss is not finite for rows of one client: the next one begins with the server's weights all the same."""
    file = tmp_path / "fault.py"
    file.write_text(
        "import torch\n"
        "calls = []\n"
        "def loss(logits, targets, weights):\n"
        "    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction='none')\n"
        "    calls.append(1)\n"
        "    return (losses * weights).sum() * (float('nan') if len(calls) == 1 else 1.0)\n"
    )
    plain = federation(rounds=1, local_steps=1, **{"train.loss_function": f"{file}:loss", "data.validation": None})
    result = quiet(plain)
    (event,) = [event for event in RunFolder.open(result.path).events() if event["kind"] == "client_failed"]
    assert event["client"] == 0 and "at local step 1 its loss is not finite" in event["reason"]
    assert RunFolder.open(result.path).metrics()[0]["clients"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(result.folder).values())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"aggregation": "svd"}, "federate.aggregation=svd .* the weights themselves"),
    ({"aggregation": "ffa"}, "federate.aggregation=ffa"),
    ({"adapter": {"rank": 4, "use_dora": True}, "aggregation": "flora"}, "aggregation=flora .* DoRA"),
    ({"ranks": [2, 2]}, "federate.ranks"),
    ({"data.packing": True}, "bin"),
    ({"scale.strategy": "zero2"}, "scale.strategy=zero2"),
    ({"model.dtype": "fp16", "scale.device": "gpu"}, "loss scale"),
    ({"adapter": {"method": "adalora"}, "local_steps": 20}, "adalora"),
    ({"train.l2_sp": 0.1}, "l2_sp"),
    ({"train.on_divergence": "rollback"}, "on_divergence=rollback"),
    ({"strategy": "scaffold"}, "train.optim is adamw_torch"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda item: str(item)[:50])
def test_what_cannot_be_is_refused_with_the_reason(
    federation: Federations, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=f"R902.*{words}"):
        quiet(federation(**settings))


def test_a_dry_run_counts_whole_models(federation: Federations) -> None:
    plain = federation()
    planned = dry_run(plain).run
    size = sum(tensor.numel() for tensor in base_of(plain).values())
    assert planned.plan["mb_up_first_round"] == pytest.approx(3 * 4 * size / 1e6, rel=0.5)
    assert planned.plan["aggregation"] == "fedit" and "the weights themselves" in planned.plan["clients_at_once"]
    assert planned.plan["mb_up_first_round"] == pytest.approx(
        RunFolder.open(quiet(plain).path).metrics()[0]["mb_up"], abs=1e-3
    )


def test_all_clients_failing_is_told(federation: Federations) -> None:
    with pytest.raises(RunFailed, match=r"R920.*not finite"):
        quiet(federation(**{"train.learning_rate": 1e30, "train.optim": "sgd", "train.max_grad_norm": 0.0}))
