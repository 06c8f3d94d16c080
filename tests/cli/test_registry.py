"""`rayft registry`: from a folder with an adapter to a canary and back, as a person types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rayft.cli import app
from rayft.runs.registry import Registry
from tests.runs.adapters import adapter_folder

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """``invoke("list")``, in a folder with the adapters ``v1``, ``v2`` and ``v3``."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAYFT_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        adapter_folder(tmp_path / f"v{number}", float(number), rank=4 * number)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, ["registry", *words])


def test_from_the_first_version_to_a_canary_and_back(invoke: Invoke, tmp_path: Path) -> None:
    assert "no adapters in" in invoke("list").stdout and not (tmp_path / "runs").exists()
    first = invoke("register", "team/support", "v1", "--promote")
    assert first.exit_code == 0 and "team/support has version 1 (rank 4, 0.4 kB); it answers every" in first.stdout
    second = invoke("register", "team/support", "v2", "--note", "longer answers", "--stage", "staging")
    assert "rayft registry promote team/support 2 lets it answer" in second.stdout
    assert invoke("weights", "team/support", "1=90", "2=10").stdout == "team/support: version 2 10%, version 1 90%\n"
    assert invoke("promote", "team/support", "2").stdout == "team/support: version 2\n"
    assert invoke("rollback", "team/support").stdout == "team/support: version 2 10%, version 1 90%\n"
    listed = invoke("list").stdout.splitlines()
    assert listed[0].split() == ["name", "answers", "versions", "pinned", "changed"]
    assert listed[1].split()[:7] == ["team/support", "version", "2", "10%,", "version", "1", "90%"]
    shown = invoke("show", "team/support").stdout
    assert "longer answers" in shown and "rollback" in shown and "production" in shown
    assert invoke("remove", "team/support", "--yes").stdout == "removed team/support\n"
    assert Registry("runs/registry").aliases() == {}


def test_json(invoke: Invoke) -> None:
    made = json.loads(invoke("register", "bot", "v1", "--json").stdout)
    assert (made["registered"], made["production"], made["weights"]) == (1, None, {})
    promoted = json.loads(invoke("promote", "bot", "1", "--json").stdout)
    assert (promoted["production"], promoted["weights"], promoted["versions"][0]["stage"]) == (
        1,
        {"1": 1},
        "production",
    )
    shown = json.loads(invoke("show", "bot", "--json").stdout)
    assert json.loads(invoke("list", "--json").stdout)["adapters"] == [shown]
    assert shown["history"][-1]["what"] == "promote" and shown["history"][-1]["who"]
    refused = invoke("promote", "bot", "7", "--json")
    assert refused.exit_code == 2 and json.loads(refused.stdout)["error"]["id"] == "R423"
    assert json.loads(invoke("remove", "bot", "-y", "--json").stdout) == {"removed": "bot", "version": None}


def test_where_the_registry_lies(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("register", "a", "v1", "--registry", "elsewhere")
    invoke("register", "b", "v1", "--storage", "store")
    monkeypatch.setenv("RAYFT_STORAGE", str(tmp_path / "env"))
    invoke("register", "c", "v1")
    found = {
        place: set(Registry(tmp_path / place).aliases()) for place in ("elsewhere", "store/registry", "env/registry")
    }
    assert found == {"elsewhere": {"a"}, "store/registry": {"b"}, "env/registry": {"c"}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("register bot v1", "R424: v1 has the content of version 1 of 'bot'"),
        ("register ../bot v1", "R422"),
        ("register bot nowhere", "R414"),
        ("register bot run:nobody", "R410"),
        ("register bot v2 --registry s3://bucket/registry", "R405"),
        ("show bots", "did you mean bot?"),
        ("promote bot 3", "its versions: 1"),
        ("rollback bot", "R429"),
        ("weights bot 1:90", "R427: '1:90' are not weights"),
        ("weights bot 1=", "R427"),
        ("weights bot 1=nan", "R427"),
        ("weights bot 2=1", "R423"),
        ("remove bot 1 --yes", "R428"),
    ],
)
def test_mistakes_get_one_clear_message(invoke: Invoke, words: str, said: str) -> None:
    invoke("register", "bot", "v1", "--promote")
    result = invoke(*words.split())
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert Registry("runs/registry").alias("bot").weights == {1: 1.0}


def test_removal_asks_first(invoke: Invoke) -> None:
    invoke("register", "bot", "v1")
    assert invoke("remove", "bot").exit_code == 1
    assert set(Registry("runs/registry").aliases()) == {"bot"}
