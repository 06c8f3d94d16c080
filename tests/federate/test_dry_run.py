"""`--dry-run`: clients, messages, memory and epsilon before round 1, as the run then finds them; nothing is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.errors import UsageError
from rayft.federate import dry_run, run
from rayft.runs.folder import RunFolder
from tests.train.conftest import Recipes, chat_rows, write_rows


@pytest.fixture
def federation(recipe: Recipes, tmp_path: Path) -> Any:
    """Chats of three tasks, split by a Dirichlet draw; keys without a dot belong to the section `federate`."""
    file = write_rows(tmp_path / "tasks.jsonl", [{**r, "task": f"t{n % 3}"} for n, r in enumerate(chat_rows(40))])

    def make(**changes: Any) -> dict[str, Any]:
        partition = {"method": "dirichlet", "column": "task", "alpha": 0.5}
        federate = {"clients": 4, "rounds": 3, "local_steps": 1, "pack_size": 2, "partition": partition}
        federate |= {key: value for key, value in changes.items() if "." not in key}
        outer = {key: value for key, value in changes.items() if "." in key}
        return recipe(
            **{"data.train": file, "data.validation": 0.2, "train.max_steps": None, **outer}, federate=federate
        )

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aggregation": "hetlora", "ranks": [2, 4], "wire": "bf16"},
        {"strategy": "scaffold", "aggregation": "ffa", "train.optim": "sgd", "train.max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_the_plan_is_what_the_run_then_does(federation: Any, settings: dict[str, Any]) -> None:
    plain = federation(**settings)
    planned = dry_run(plain)
    assert not Path(plain["storage"], "test").exists(), "no run was made"
    plan = planned.run.plan
    result = run(plain, quiet=True)
    first = RunFolder.open(result.path).metrics()[0]
    counts = json.loads(Path(result.path, "clients.json").read_text())
    assert planned.clients == dict(zip(counts["clients"], map(sum, counts["counts"]), strict=True))
    assert sum(planned.clients.values()) == plan["examples"] == 32 and plan["validation_examples"] == 8
    assert first["mb_down"] == pytest.approx(plan["mb_down_first_round"], abs=1e-3) and plan["mb_down_first_round"]
    if "ranks" not in settings:
        assert first["mb_up"] == pytest.approx(plan["mb_up_first_round"], abs=1e-3)
    assert (plan["cohort"], plan["blocks_per_round"], plan["workers"]) == (first["cohort"], 2, 1)
    assert planned.run.memory["block"] > planned.run.memory["base_with_one_client"] > 0


def test_epsilon_is_that_of_the_last_round(federation: Any) -> None:
    private = {"clients": 8, "partition": {"method": "iid"}, "cohort": {"size": 0.5, "sampling": "poisson"}}
    plain = federation(**private, privacy={"noise_multiplier": 1.0, "noise_seed": 1, "delta": 1e-3})
    plan = dry_run(plain).run.plan
    result = run(plain, quiet=True)
    last = RunFolder.open(result.path).metrics()[-1]
    assert plan["epsilon_after_last_round"] == pytest.approx(last["epsilon"], abs=1e-4) and last["round"] == 3
    assert plan["rounds_in_privacy_budget"] == 3
    budget = {"noise_multiplier": 1.0, "delta": 1e-3, "epsilon": 5.0}
    short = dry_run(federation(**private, rounds=200, privacy=budget)).run.plan
    assert 1 <= short["rounds_in_privacy_budget"] < 200 and short["epsilon_after_last_round"] <= 5.0
    more = {**budget, "epsilon": None}
    over = dry_run(federation(**private, rounds=short["rounds_in_privacy_budget"] + 1, privacy=more)).run.plan
    assert over["epsilon_after_last_round"] > 5.0, "the budget holds no further round"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clients": 1000, "partition": {"method": "iid"}}, "R901"),
    ({"strategy": "scaffold"}, "R902"),
    ({"privacy": {"epsilon": 1e-6}, "cohort": {"sampling": "poisson"}}, "R903"),
    ({"communication_budget_mb": 1e-6}, "R903"),
    ({"pack_size": 10**9}, "R905"),
    ({"privacy": {"adaptive": True, "count_stddev": 0.1}, "cohort": {"sampling": "poisson"}}, "R911"),
]


@pytest.mark.parametrize(("settings", "id"), REFUSED, ids=lambda item: str(item)[:50])
def test_what_the_run_would_refuse_is_refused(federation: Any, settings: dict[str, Any], id: str) -> None:
    with pytest.raises(UsageError) as caught:
        dry_run(federation(**settings))
    assert caught.value.id == id


def test_rounds_that_the_communication_budget_holds(federation: Any) -> None:
    plan = dry_run(federation(aggregation="fedit", rounds=50)).run.plan
    whole = plan["mb_down_first_round"] + plan["mb_up_first_round"]
    limited = federation(aggregation="fedit", rounds=50, communication_budget_mb=3.5 * whole)
    assert dry_run(limited).run.plan["rounds_in_communication_budget"] == 3


def test_as_a_user_types_it(federation: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(federation()))
    shown = CliRunner().invoke(app, ["federate", str(file), "--dry-run"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for words in ("Clients", "mb down first round", "size ratio", "each further client of a block"):
        assert words in shown.stdout
    told = json.loads(CliRunner().invoke(app, ["federate", str(file), "--dry-run", "--json"]).stdout)
    assert sum(told["clients"].values()) == 32 and told["heterogeneity"]["clients"] == 4
    assert told["recipe"]["federate.rounds"] == {"value": 3, "origin": "user"}
    there = CliRunner().invoke(app, ["federate", str(file), "--dry-run", "model.base=org/elsewhere"])
    assert there.exit_code == 0 and "no plan: org/elsewhere is not on this machine" in there.stdout
