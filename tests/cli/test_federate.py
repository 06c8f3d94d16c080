"""`rayft federate` passes on what was said, and prints the best round."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rayft.cli import app
from rayft.errors import RunFailed
from rayft.federate import FederateResult

MINIMAL = ["model.base=org/model", "data.train=my.jsonl"]


@pytest.fixture
def federated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces `rayft.federate.run`; holds the arguments of each call."""
    calls: list[Any] = []

    def stand_in(source: str | None, overrides: list[str], **options: Any) -> FederateResult:
        calls.append((source, overrides, options))
        if "name=broken" in overrides:
            raise RunFailed("R920", "3 of 4 clients failed in round 1", "mend them")
        metrics = {"round": 3, "validation_loss": 0.5, "gap": 1e-16, "epsilon": float("inf")}
        return FederateResult("/runs/f", "f", 3, 5, "rounds", metrics)

    monkeypatch.setattr("rayft.federate.run", stand_in)
    return calls


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["federate", *words], env={"COLUMNS": "200"})


def test_recipe_overrides_and_options_are_passed_on(federated: list[Any]) -> None:
    done = invoke("recipe.yaml", "federate.rounds=5", "--resume")
    assert done.exit_code == 0, done.output
    assert federated == [("recipe.yaml", ["federate.rounds=5"], {"mode": "resume"})]
    for words in ("best round", "0.5", "/runs/f/report.md", "rayft evaluate /runs/f"):
        assert words in done.stdout


def test_json(federated: list[Any]) -> None:
    found = json.loads(invoke(*MINIMAL, "--json").stdout)
    assert found["best"] == {
        "round": 3,
        "metrics": {"round": 3, "validation_loss": 0.5, "gap": 1e-16, "epsilon": None},
    }
    assert (found["rounds"], found["ended"], found["state"]) == (5, "rounds", "finished")


def test_an_error_has_its_id_and_exit_code(federated: list[Any]) -> None:
    done = invoke(*MINIMAL, "name=broken")
    assert done.exit_code == 1 and "R920" in done.output
    assert json.loads(invoke(*MINIMAL, "name=broken", "--json").stdout)["error"]["id"] == "R920"


def test_a_misspelt_strategy_is_told_the_nearest_name() -> None:
    done = invoke(*MINIMAL, "federate.strategy=fedpro")
    assert done.exit_code == 2 and "did you mean fedprox" in done.output


def test_dry_run_starts_nothing(federated: list[Any]) -> None:
    done = invoke(*MINIMAL, "adapter={}", "federate.rounds=7", "--dry-run")
    assert done.exit_code == 0, done.output
    assert (
        federated == []
        and "federate.rounds" in done.stdout
        and "no plan: org/model is not on this machine" in done.stdout
    )
