"""`rayft train` with --dry-run, --smoke, --json and its failures, as a user types them, on a tiny model without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.runs.folder import RunFolder
from tests.train.conftest import Recipes


def typed(tmp_path: Path, plain: dict[str, Any], *words: str) -> Any:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(plain))
    return CliRunner().invoke(app, ["train", str(file), *words])


def test_dry_run_plans_and_starts_nothing(recipe: Recipes, tmp_path: Path) -> None:
    plain = recipe()
    done = typed(tmp_path, plain, "--dry-run", "--json", "scale.workers=2", "train.micro_batch_size=1")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["recipe"]["train.learning_rate"] == {"value": 0.001, "origin": "user"}
    assert told["recipe"]["seed"] == {"value": 17, "origin": "default"}
    assert told["plan"]["examples"] == 22 and told["plan"]["steps_per_epoch"] == 6
    assert told["plan"]["micro_steps_per_step"] == 2
    parts = dict(told["memory_bytes"])
    total = parts.pop("total")
    assert total == sum(parts.values()) - parts["offloaded"] > 0
    assert not Path(plain["storage"], "test").exists()


def test_dry_run_for_people(recipe: Recipes, tmp_path: Path) -> None:
    done = typed(tmp_path, recipe(), "--dry-run")
    assert done.exit_code == 0
    assert "default" in done.stdout and "total steps" in done.stdout and "GB" in done.stdout


def test_smoke_leaves_nothing_behind(recipe: Recipes, tmp_path: Path) -> None:
    plain = recipe(**{"data.validation": 0.2})
    done = typed(tmp_path, plain, "--smoke", "--json")
    assert done.exit_code == 0, done.output
    assert {"loss", "validation_loss", "answer"} <= set(json.loads(done.stdout))
    assert not Path(plain["storage"], "test").exists()


def test_json_is_one_object_and_a_name_in_use_is_refused(recipe: Recipes, tmp_path: Path) -> None:
    plain = recipe(**{"train.max_steps": 2})
    first = typed(tmp_path, plain, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["state"] == "finished"
    again = typed(tmp_path, plain, "--json")
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"]["id"] == "R402"
    assert typed(tmp_path, plain, "--new").exit_code == 0
    assert RunFolder.open(Path(plain["storage"], "test-2")).state == "finished"


def test_resuming_with_another_mathematics_is_refused(recipe: Recipes, tmp_path: Path) -> None:
    plain = recipe(**{"train.max_steps": 2})
    assert typed(tmp_path, plain).exit_code == 0
    done = typed(tmp_path, plain, "--resume", "train.learning_rate=0.5")
    assert done.exit_code == 2
    assert "train.learning_rate" in done.stderr and "0.001 -> 0.5" in done.stderr


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ("train.trainer_args={adam_beta9: 1}", "R610"),
        ("train.trainer_args={adam_beta1: [1]}", "R610"),
        ("train.loss_function=nowhere.py:loss", "R614"),
        ("evaluate.metrics=[exact_mach]", "R701"),
        ("data.train=missing.jsonl", "R2"),
        ("model.base=./nowhere", "R301"),
    ],
)
def test_what_the_user_can_fix_is_said_before_anything_starts(
    recipe: Recipes, tmp_path: Path, change: str, id: str
) -> None:
    plain = recipe()
    done = typed(tmp_path, plain, change)
    assert done.exit_code == 2, done.output
    assert id in done.stderr and "Traceback" not in done.stderr
    assert not Path(plain["storage"], "test").exists()


def test_a_preemption_notice_saves_once_and_goes_on(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayft.train import context, control, fit
    from tests.train.test_faults import events

    monkeypatch.setattr(control, "PREEMPTION_POLL_SECONDS", 0.0)
    monkeypatch.setattr(context.LocalContext, "preempted", lambda self: True)
    result = fit(recipe(**{"train.max_steps": 5}), answer=None, quiet=True)
    assert len(events(result.path, "preemption")) == 1
    assert list(RunFolder.open(result.path).checkpoints()) == [1, 5]
