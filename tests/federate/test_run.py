"""`rayft.federate.run` on the tiny model, in this process: what clients train, and what the run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayft.config import load
from rayft.data.examples import Selection
from rayft.errors import RayftError, UsageError
from rayft.federate import run
from rayft.federate.books import read_book
from rayft.federate.clients import seed_of
from rayft.federate.data import ClientData, Shares, held_out
from rayft.federate.local import LocalJob, PackLocal
from rayft.federate.state import norm
from rayft.federate.task import kept_file
from rayft.runs.folder import RunFolder
from rayft.runs.reference import resolve
from rayft.train import fit
from tests.train.conftest import Recipes, chat_rows, write_rows

Federations = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 chats, each of one of three tasks."""
    return write_tasks(tmp_path_factory.mktemp("data"), 40)


@pytest.fixture
def federation(recipe: Recipes, tasks_file: str) -> Federations:
    """`federation(strategy=..., **{"train.optim": ...})`: keys without a dot belong to the section `federate`."""

    return lambda **changes: federated(recipe, tasks_file, 4, changes)


def write_tasks(folder: Path, count: int) -> str:
    rows = [{**row, "task": f"task-{number % 3}"} for number, row in enumerate(chat_rows(count))]
    return write_rows(folder / "tasks.jsonl", rows)


def federated(recipe: Recipes, data: str, clients: int, changes: dict[str, Any]) -> dict[str, Any]:
    federate = {"clients": clients, "rounds": 2, "local_steps": 2, "pack_size": 2}
    federate |= {key: value for key, value in changes.items() if "." not in key and key != "name"}
    outer = {key: value for key, value in changes.items() if "." in key or key == "name"}
    return recipe(**{"data.train": data, "data.validation": 0.2, "train.max_steps": None, **outer}, federate=federate)


def quiet(plain: dict[str, Any], **options: Any) -> Any:
    return run(plain, quiet=True, **options)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "adapter_model.safetensors"))


def alike(one: str, other: str) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_federation_is_a_run(federation: Federations) -> None:
    result = quiet(
        federation(partition={"method": "dirichlet", "column": "task", "alpha": 0.5}, evaluate={"holdout": 0.2})
    )
    folder = RunFolder.open(result.path)
    assert folder.record.verb == "federate" and folder.state == "finished"
    rows = folder.metrics()
    assert [row["round"] for row in rows] == [1, 2] and rows[1]["validation_loss"] < rows[0]["validation_loss"]
    assert {"loss", "gap", "mb_up", "mb_down", "federated_loss", "federated_worst_decile", "tokens"} <= rows[0].keys()
    assert all(row["gap"] < 1e-12 for row in rows), "svd with its residual is exact"
    assert result.best == 2 and alike(result.folder, f"{result.path}/rounds/2/adapter")
    assert resolve("run:test", str(Path(result.path).parent)).kind == "adapter"
    assert resolve("run:test@round-1", str(Path(result.path).parent)).path.endswith("rounds/1/adapter")
    config = json.loads(Path(result.folder, "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == folder.record.facts["rank"] > 4
    report = Path(result.report).read_text()
    assert "Federation test" in report and "size ratio" in report
    assert Path(result.path, "rounds.png").is_file() and Path(result.path, "clients.png").is_file()
    again = quiet(
        federation(partition={"method": "dirichlet", "column": "task", "alpha": 0.5}, evaluate={"holdout": 0.2}),
        mode="resume",
    )
    assert again == result, "a finished run is not run again"


def test_stock_peft_gives_the_validation_loss_that_was_logged(federation: Federations) -> None:
    """The exported adapter does what accumulator and factors did together."""
    plain = federation()
    result = quiet(plain)
    book = read_book(RunFolder.open(result.path), 2)
    assert book.server.accumulator, "there is something to put together"
    base = AutoModelForCausalLM.from_pretrained(plain["model"]["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, result.folder).eval()
    prepared = next(Path(result.path).parent.glob(".cache/data/*/validation.arrow"))
    examples = Selection(prepared, range(8))
    total = weight = 0.0
    for row in examples:
        ids, weights = torch.tensor(row["input_ids"])[None].long(), torch.tensor(row["loss_weights"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total, weight = total + float((losses * weights[1:]).sum()), weight + float(weights.double().sum())
    assert total / weight == pytest.approx(result.metrics["validation_loss"], rel=2e-5)


def test_one_client_and_one_round_is_training(federation: Federations, recipe: Recipes, tasks_file: str) -> None:
    """The same start, data, order, steps and optimiser give the adapter of `rayft train`."""
    start = fit(recipe(name="start", **{"data.train": tasks_file, "train.max_steps": 1}), answer=None, quiet=True)
    same = {"adapter.init_from": start.folder, "data.validation": None}
    result = quiet(federation(name="fed", clients=1, rounds=1, local_steps=4, aggregation="fedit", **same))
    constant = {"train.max_steps": 4, "train.lr_scheduler_type": "constant", "train.warmup_steps": 0.0}
    plain = recipe(name="alone", **{"data.train": tasks_file, **constant, **same}, seed=seed_of(17, 0, 1))
    alone = fit(plain, answer=None, quiet=True)
    ours, theirs, begun = tensors(result.folder), tensors(alone.folder), tensors(start.folder)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5), name
        assert float((theirs[name] - begun[name]).abs().max()) > 1e-3


def initial_a(plain: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    from rayft.models import load as models
    from rayft.multilora.start import initial

    recipe = load({**plain, "seed": seed}).recipe
    model = models.load_base(recipe, plain["model"]["base"], device="cpu")
    state = initial(model, recipe, models.load_tokenizer(recipe, plain["model"]["base"]))
    return {name: tensor.clone() for name, tensor in state.tensors.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "fedex"},
        {"aggregation": "flora", "ranks": [2, 4]},
        {"aggregation": "hetlora", "ranks": [2, 4]},
        {"aggregation": "fedsa"},
        {"strategy": "fedprox", "mu": 0.1, "aggregation": "fedit", "optimizer_state": "keep"},
        {"strategy": "scaffold", "train.optim": "sgd", "train.max_grad_norm": 0.0, "aggregation": "ffa"},
        {"privacy": {"noise_seed": 1}, "cohort": {"size": 0.8, "sampling": "poisson"}},
        {
            "wire": "bf16",
            "local_epochs": 0.5,
            "local_steps": None,
            "partition": {"method": "natural", "column": "task"},
        },
    ],
    ids=str,
)
def test_stopped_and_resumed_is_uninterrupted(federation: Federations, settings: dict[str, Any]) -> None:
    """One round, then another one in a second life, against two in one; client states come from their files."""
    whole = quiet(federation(name="whole", rounds=3, **settings))
    parts = federation(name="parts", rounds=3, **settings)
    done = RunFolder.create(load(parts), "federate")
    done.release()
    stopped = quiet_until(parts, 2)
    assert stopped
    result = quiet(parts, mode="resume")
    for number in (2, 3):
        assert alike(f"{result.path}/rounds/{number}/adapter", f"{whole.path}/rounds/{number}/adapter")
    ours, theirs = (read_book(RunFolder.open(one.path), 3) for one in (result, whole))
    assert ours.row["loss"] == theirs.row["loss"] and ours.kept == theirs.kept
    if settings.get("strategy") == "scaffold":
        assert norm(ours.server.control) > 0 and all(Path(kept_file(result.path, c, 3)).is_file() for c in range(4))


def test_fedbuff_goes_on_after_a_kill(federation: Federations) -> None:
    """The order of arrival is part of it, so only the rounds that were saved are the same."""
    plain = federation(strategy="fedbuff", buffer=3, rounds=3)
    assert quiet_until(plain, 2)
    saved = tensors(f"{plain['storage']}/test/rounds/2/adapter")
    result = quiet(plain, mode="resume")
    rows = RunFolder.open(result.path).metrics()
    assert [row["clients"] for row in rows] == [3, 3, 3] and all("staleness" in row for row in rows)
    again = tensors(f"{result.path}/rounds/2/adapter")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]


def quiet_until(plain: dict[str, Any], number: int) -> bool:
    """Run until a round is saved, then end as a kill would: nothing is written any more."""
    from rayft.federate import federation as module

    class Killed(BaseException):
        pass

    original = module.Federation._round

    def killed(self: Any, book: Any) -> Any:
        if book.server.rounds == number:
            raise Killed
        return original(self, book)

    module.Federation._round = killed  # type: ignore[method-assign]
    try:
        run(plain, quiet=True, mode="resume")
    except Killed:
        return True
    finally:
        module.Federation._round = original  # type: ignore[method-assign]
    return False


def job_of(plain: dict[str, Any], result: Any) -> LocalJob:
    recipe = load(plain).recipe
    data = next(Path(result.path).parent.glob(".cache/data/*/train.arrow")).parent
    return LocalJob(recipe.model_dump(mode="json"), result.path, plain["model"]["base"], "cpu", 1, str(data), data.name,
                    f"{result.path}/partition.npz")  # fmt: skip


def test_packs_and_lone_clients_train_alike(federation: Federations) -> None:
    """A client's answer does not depend on who shares its pack, to rounding."""
    from rayft.federate.aggregate import Setting
    from rayft.federate.messages import Server
    from rayft.federate.task import Block, Task

    plain = federation(aggregation="fedit")
    result = quiet(plain)
    local = PackLocal(job_of(plain, result))
    opening = local.open()
    federate = load(plain).recipe.federate
    assert federate is not None
    task = Task(Setting(federate, 1, opening.alphas, 4, 17), Server(opening.state), 1e-3)
    together = local.train(task, Block(0, (0, 1, 2, 3)))
    for number in range(4):
        (alone,) = local.train(task, Block(0, (number,)))
        for name, tensor in alone.state.items():
            assert torch.allclose(tensor, together[number].state[name], rtol=0, atol=2e-5), name
        assert alone.examples == together[number].examples == len(local.examples(number)[0].indices)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("raise ValueError('a bad word')", "ValueError: a bad word"), ("losses = losses * float('nan')", "is not finite")],
)
def test_a_broken_client_is_found_in_its_pack(federation: Federations, tmp_path: Path, fault: str, reason: str) -> None:
    """The loss function goes wrong at a word that only one client's data has: the others' work counts."""
    rows = [{**row, "task": f"t{number % 4}"} for number, row in enumerate(chat_rows(24))]
    for row in rows:
        if row["task"] == "t2":
            row["messages"][-1]["content"] += " @@@@@@@@"
    file = tmp_path / "fault.py"
    file.write_text(
        "import torch\n"
        "def loss(logits, targets, weights):\n"
        "    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction='none')\n"
        f"    if (targets == {token_of(federation()['model']['base'])}).any():\n"
        f"        {fault}\n"
        "    return (losses * weights).sum()\n"
    )
    settings = {"partition": {"method": "natural", "column": "task"}, "pack_size": 4}
    data = {"data.train": write_rows(tmp_path / "marked.jsonl", rows), "data.validation": None}
    result = quiet(federation(**settings, **data, **{"train.loss_function": f"{file}:loss"}))
    folder = RunFolder.open(result.path)
    assert all(row["clients"] == 3 and row["failed"] == 1 for row in folder.metrics())
    events = [event for event in folder.events() if event["kind"] == "client_failed"]
    assert {event["client"] for event in events} == {2} and reason in events[0]["reason"]
    assert "client 2" in Path(result.report).read_text()


def token_of(base: str) -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)(" @@@@@@@@")["input_ids"][-1]


def test_fedprox_pulls_to_the_start_and_without_mu_is_fedavg(federation: Federations) -> None:
    far = quiet(federation(name="far", rounds=1, strategy="fedprox", mu=0.0, local_steps=6, aggregation="fedit"))
    plain = quiet(federation(name="plain", rounds=1, local_steps=6, aggregation="fedit"))
    assert alike(far.folder, plain.folder)
    near = quiet(federation(name="near", rounds=1, strategy="fedprox", mu=1e4, local_steps=6, aggregation="fedit"))
    start = initial_a(federation(), 17)

    def moved(folder: str) -> float:
        return norm({name: tensor - start[name] for name, tensor in tensors(folder).items()})

    assert moved(near.folder) < 0.7 * moved(plain.folder)


def test_fedsa_leaves_an_adapter_for_each_client(federation: Federations) -> None:
    result = quiet(federation(aggregation="fedsa", evaluate={"holdout": 0.25}))
    folders = [Path(result.path, "clients", str(client), "adapter") for client in range(4)]
    found = [tensors(str(folder)) for folder in folders]
    for name in found[0]:
        shared = torch.equal(found[0][name], found[1][name])
        assert shared == (".lora_A" in name), name
        assert torch.count_nonzero(found[0][name])
    rows = RunFolder.open(result.path).metrics()
    assert "validation_loss" not in rows[-1] and rows[1]["federated_loss"] < rows[0]["federated_loss"]


def test_ffa_trains_b_only_and_rolora_one_factor_a_round(federation: Federations) -> None:
    begun = initial_a(federation(), 17)
    frozen = tensors(quiet(federation(name="ffa", aggregation="ffa")).folder)
    for name, tensor in frozen.items():
        assert torch.equal(tensor, begun[name]) == (".lora_A" in name), name
    path = quiet(federation(name="rolora", aggregation="rolora")).path
    first, second = (tensors(f"{path}/rounds/{number}/adapter") for number in (1, 2))
    for name in first:
        assert torch.equal(first[name], begun[name]) == (".lora_A" in name), name
        assert torch.equal(first[name], second[name]) == (".lora_B" in name), name


def test_scaffold_corrects_from_the_second_round_on(federation: Federations) -> None:
    """With c = 0 the first round is fedavg's; c_k is then the client's mean gradient, (w_t - y) / (K rate)."""
    sgd = {"train.optim": "sgd", "train.max_grad_norm": 0.0, "train.learning_rate": 0.5, "aggregation": "ffa"}
    one = federation(name="scaffold", strategy="scaffold", clients=1, weights="uniform", **sgd)
    path = quiet(one).path
    begun, after = initial_a(one, 17), tensors(f"{path}/rounds/1/adapter")
    control = read_book(RunFolder.open(path), 1).server.control
    assert control and all(".lora_B" in name for name in control)
    for name, c in control.items():
        assert torch.allclose(c, (begun[name] - after[name]).double() / (2 * 0.5), rtol=0, atol=1e-7)
    many = {"weights": "uniform", "clients": 4, **sgd}
    corrected = quiet(federation(name="corrected", strategy="scaffold", **many)).path
    plain = quiet(federation(name="plain", **many)).path
    assert alike(f"{corrected}/rounds/1/adapter", f"{plain}/rounds/1/adapter")
    assert not alike(f"{corrected}/rounds/2/adapter", f"{plain}/rounds/2/adapter")


def test_shares_are_read_as_they_were_written(federation: Federations) -> None:
    result = quiet(federation(partition={"method": "natural", "column": "task"}, rounds=1))
    shares = Shares.read(f"{result.path}/partition.npz")
    assert shares.names == ("task-0", "task-1", "task-2") and sum(shares.sizes) == 32
    data = next(Path(result.path).parent.glob(".cache/data/*/train.arrow"))
    whole = ClientData(str(data.parent), "", tuple(range(32))).split("train")
    one = ClientData(str(data.parent), "", tuple(shares.of(1).tolist())).split("train")
    assert whole is not None and one is not None
    assert (
        len(one) == shares.sizes[1]
        and one[0]["input_ids"].tolist() == whole[int(shares.of(1)[0])]["input_ids"].tolist()
    )
    assert one.lengths.tolist() == [len(row["input_ids"]) for row in one]
    assert one.weight_sums.tolist() == pytest.approx([float(row["loss_weights"].sum()) for row in one])
    assert set(whole.column("label")) == {"task-0", "task-1", "task-2"}
    train, out = held_out(shares.of(0), 0.25, 1, 0)
    assert sorted([*train, *out]) == sorted(shares.of(0)) and len(out) == -(-len(shares.of(0)) // 4)
    assert len(held_out(shares.of(0)[:1], 0.5, 1, 0)[0]) == 1


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"strategy": "scaffold"}, "R902", "train.optim is adamw_torch"),
    ({"strategy": "scaffold", "train.optim": "sgd"}, "R902", "max_grad_norm is 1.0"),
    ({"ranks": [2, 8]}, "R902", "adapter.rank, the server's, is 4"),
    ({"data.packing": True}, "R902", "bin"),
    ({"clients": 1000}, "R901", "cannot be split over 1000"),
    ({"partition": {"method": "natural", "column": "nonsense"}}, "R216", "task"),
    ({"strategy": "fedavgg"}, "R105", "fedavg"),
    ({"aggregation": "ffa", "ranks": [2, 4]}, "R105", "different rank"),
    ({"privacy": {"epsilon": 1e-6}, "cohort": {"sampling": "poisson"}}, "R903", "privacy.epsilon"),
]


@pytest.mark.parametrize(("settings", "id", "words"), REFUSED, ids=lambda item: str(item)[:50])
def test_bad_input_is_one_clear_message(federation: Federations, settings: dict[str, Any], id: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        quiet(federation(**settings))
    assert caught.value.id == id and words in str(caught.value)


def test_other_settings_are_refused_at_resume(federation: Federations) -> None:
    quiet_until(federation(), 1)
    with pytest.raises(RayftError, match="R930"):
        quiet(federation(strategy="fedavgm", aggregation="fedit"), mode="resume")
    result = quiet(federation(rounds=3), mode="resume")
    assert result.rounds == 3, "more rounds are allowed"
