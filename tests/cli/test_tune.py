"""`rayft tune` passes on what was said, and prints the best trial."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rayft.cli import app
from rayft.config import load
from rayft.errors import RunStopped
from rayft.tune.driver import TuneResult
from rayft.tune.rows import TrialRow

MINIMAL = ["model.base=org/model", "data.train=my.jsonl"]
ROWS = [
    TrialRow(0, {"adapter.rank": 4}, "pruned", 3, 9, {"validation_loss": 2.0}),
    TrialRow(1, {"adapter.rank": 8}, "complete", 9, 9, {"validation_loss": 0.25, "perplexity": 1.28}),
]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces `rayft.tune.search`; holds the arguments of each call."""
    calls: list[Any] = []

    def stand_in(source: str | None, overrides: list[str], **options: Any) -> TuneResult:
        calls.append((source, overrides, options))
        recipe = load(None, MINIMAL).recipe
        metrics = dict(ROWS[1].metrics)
        return TuneResult("/runs/s", "s", 1, "adapter", metrics, recipe, ROWS, [("validation_loss", "min")])

    monkeypatch.setattr("rayft.tune.search", stand_in)
    return calls


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["tune", *words], env={"COLUMNS": "200"})


def test_recipe_overrides_and_options_are_passed_on(searched: list[Any]) -> None:
    done = invoke("recipe.yaml", "tune.num_samples=2", "--resume", "--dashboard")
    assert done.exit_code == 0, done.output
    assert searched == [("recipe.yaml", ["tune.num_samples=2"], {"mode": "resume", "dashboard": True})]
    for words in ("best trial", "adapter.rank", "0.25", "/runs/s/report.md", "rayft train /runs/s/best.yaml"):
        assert words in done.stdout


def test_json(searched: list[Any]) -> None:
    found = json.loads(invoke(*MINIMAL, "--json").stdout)
    assert found["best"] == {
        "trial": 1,
        "kind": "adapter",
        "values": {"adapter.rank": 8},
        "metrics": {"validation_loss": 0.25, "perplexity": 1.28},
    }
    assert [trial["state"] for trial in found["trials"]] == ["pruned", "complete"]


def test_two_answers_at_once(searched: list[Any]) -> None:
    done = invoke(*MINIMAL, "--resume", "--new")
    assert done.exit_code == 2 and "R111" in done.stderr and not searched


def test_a_stopped_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise RunStopped("R742", "stopped", "--resume goes on")

    monkeypatch.setattr("rayft.tune.search", stop)
    done = invoke(*MINIMAL)
    assert done.exit_code == 130 and "--resume" in done.stderr


def test_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke(
        *MINIMAL, "data.validation=0.1", "tune.space={adapter.rank: {choice: [4]}}", "adapter={}", "--dry-run"
    )
    assert done.exit_code == 0, done.output
    assert "choice [4]" in done.stdout and "pack: the trials are LoRA adapters" in done.stdout
