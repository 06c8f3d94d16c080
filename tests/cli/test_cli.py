"""The command line: what it prints where, and its exit codes. The verbs themselves are tested in their own rooms."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rayft import __version__
from rayft.cli import app
from rayft.cli.quiet import SETTINGS, quiet
from rayft.errors import RunFailed, RunStopped, UsageError

MINIMAL = ["model.base=org/model", "data.train=my.jsonl"]
HEAVY = ("torch", "ray", "transformers", "peft", "datasets", "accelerate", "numpy", "pyarrow")

Invoke = Callable[..., Result]


@dataclass
class Trained:
    path: str = "/runs/one"
    kind: str = "adapter"
    state: str = "finished"
    metrics: dict[str, float] = field(default_factory=lambda: {"validation_loss": 0.25})


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in SETTINGS.items():  # so that what `quiet` sets ends with the test
        monkeypatch.setenv(name, value)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words))


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces `rayft.train.fit`; `calls` are its arguments, `answer` is what it does."""
    import rayft.train

    state: dict[str, Any] = {"calls": [], "answer": Trained}

    def stand_in(source: str | None, overrides: list[str], **options: Any) -> Trained:
        state["calls"].append((source, overrides, options))
        return state["answer"]()

    monkeypatch.setattr(rayft.train, "fit", stand_in, raising=False)
    return state


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from rayft.cli import main\n"
        "sys.argv = ['rayft', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "rayft" in done.stdout and "train" in done.stdout
    # Processor time, not the clock: other processes share the machine that runs the tests.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


@pytest.mark.parametrize(
    "words", [["train"], ["tune"], ["evaluate"], ["submit"], ["recipe", "show"], ["models", "pull"], ["runs", "rm"]]
)
def test_every_command_explains_itself(invoke: Invoke, words: list[str]) -> None:
    done = invoke(*words, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout and "--debug" in done.stdout


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"rayft {__version__}\n"


def test_shell_completion_is_there() -> None:
    environment = os.environ | {"_RAYFT_COMPLETE": "complete_bash", "COMP_WORDS": "rayft ru", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['rayft']; from rayft.cli import app; app(prog_name='rayft')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["runs"], done.stderr


def test_train_passes_recipe_overrides_and_mode(invoke: Invoke, fit: dict[str, Any]) -> None:
    done = invoke("train", "recipe.yaml", "train.epochs=2", "--new", "adapter=null")
    assert done.exit_code == 0, done.stderr
    assert fit["calls"] == [("recipe.yaml", ["train.epochs=2", "adapter=null"], {"mode": "new"})]
    assert "/runs/one" in done.stdout and "0.25" in done.stdout
    assert "rayft evaluate /runs/one" in done.stdout


def test_train_needs_no_recipe_and_a_path_may_hold_an_equals_sign(invoke: Invoke, fit: dict[str, Any]) -> None:
    invoke("train", *MINIMAL)
    invoke("train", "runs/lr=1/recipe.yaml", "--resume")
    assert fit["calls"] == [
        (None, MINIMAL, {"mode": "fail"}),
        ("runs/lr=1/recipe.yaml", [], {"mode": "resume"}),
    ]


def test_train_prints_one_json_object(invoke: Invoke, fit: dict[str, Any]) -> None:
    def noisy() -> Trained:
        print("a library that talks")
        return Trained()

    fit["answer"] = noisy
    done = invoke("train", "recipe.yaml", "--json")
    assert json.loads(done.stdout) == {
        "path": "/runs/one",
        "kind": "adapter",
        "state": "finished",
        "metrics": {"validation_loss": 0.25},
    }
    assert "a library that talks" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "id"),
    [
        (UsageError("R402", "name in use", "use --new"), 2, "R402"),
        (RunFailed("R601", "diverged"), 1, "R601"),
        (RunStopped("R602", "stopped"), 130, "R602"),
        (KeyboardInterrupt(), 130, "R001"),
        (ZeroDivisionError("a defect"), 1, "R000"),
    ],
)
def test_errors_have_an_id_an_exit_code_and_no_traceback(
    invoke: Invoke, fit: dict[str, Any], error: BaseException, code: int, id: str
) -> None:
    fit["answer"] = raising(error)

    plain = invoke("train", "recipe.yaml")
    assert plain.exit_code == code
    assert plain.stdout == ""
    assert plain.stderr.startswith(f"{id}: ")
    assert "Traceback" not in plain.stderr

    as_json = invoke("train", "recipe.yaml", "--json")
    assert as_json.exit_code == code
    answer = json.loads(as_json.stdout)["error"]
    assert answer["id"] == id and set(answer) == {"id", "message", "hint"}

    assert "Traceback" in invoke("train", "recipe.yaml", "--debug").stderr


def test_an_error_shows_its_hint(invoke: Invoke, fit: dict[str, Any]) -> None:
    fit["answer"] = raising(UsageError("R402", "name [in] use", "use --new"))
    assert invoke("train", "recipe.yaml").stderr == "R402: name [in] use\n  hint: use --new\n"


def test_a_stopped_run_leaves_with_130(invoke: Invoke, fit: dict[str, Any]) -> None:
    fit["answer"] = lambda: Trained(state="stopped")
    done = invoke("train", "recipe.yaml")
    assert done.exit_code == 130
    assert "--resume" in done.stdout


def test_options_that_exclude_each_other(invoke: Invoke, fit: dict[str, Any]) -> None:
    done = invoke("train", "recipe.yaml", "--resume", "--overwrite")
    assert done.exit_code == 2
    assert done.stderr.startswith("R111: --resume and --overwrite")
    assert fit["calls"] == []


def test_two_recipes(invoke: Invoke, fit: dict[str, Any]) -> None:
    done = invoke("train", "a.yaml", "train.epochs", "=", "2")
    assert done.exit_code == 2
    assert done.stderr.startswith("R110: ")
    assert fit["calls"] == []


def test_dry_run_starts_nothing(invoke: Invoke, fit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import rayft.train

    class Plan:
        def to_json(self) -> dict[str, Any]:
            return {"steps": 3}

        def to_rich(self) -> str:
            return "three steps"

    monkeypatch.setattr(rayft.train, "dry_run", lambda source, overrides: Plan(), raising=False)
    assert invoke("train", "recipe.yaml", "--dry-run").stdout == "three steps\n"
    assert json.loads(invoke("train", "recipe.yaml", "--dry-run", "--json").stdout) == {"steps": 3}
    assert fit["calls"] == []


def test_smoke_prints_what_it_found(invoke: Invoke, fit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import rayft.train.smoke

    monkeypatch.setattr(rayft.train.smoke, "smoke", lambda source, overrides: {"loss": 2.5, "answer": "hi"})
    assert json.loads(invoke("train", "recipe.yaml", "--smoke", "--json").stdout) == {"loss": 2.5, "answer": "hi"}
    assert "2.5" in invoke("train", "recipe.yaml", "--smoke").stdout
    assert fit["calls"] == []


def test_not_a_number_is_null_in_json(invoke: Invoke, fit: dict[str, Any]) -> None:
    fit["answer"] = lambda: Trained(metrics={"loss": float("nan")})
    assert json.loads(invoke("train", "recipe.yaml", "--json").stdout)["metrics"] == {"loss": None}


def test_evaluate_prints_the_score(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import rayft.evaluate

    class Score:
        def __init__(self, *words: Any) -> None:
            self.words = words

        def to_json(self) -> dict[str, Any]:
            return {"words": self.words}

        def to_rich(self) -> str:
            return "a table"

    monkeypatch.setattr(rayft.evaluate, "score", Score)
    done = invoke("evaluate", "run:one", "evaluate.limit=5", "--json")
    assert json.loads(done.stdout) == {"words": ["run:one", ["evaluate.limit=5"]]}
    assert invoke("evaluate", "run:one").stdout == "a table\n"


def test_submit_passes_address_and_mode(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import rayft.runtime.jobs

    monkeypatch.setattr(
        rayft.runtime.jobs, "submit", lambda source, overrides, **rest: {"job": source, "words": overrides, **rest}
    )
    done = invoke("submit", "r.yaml", "seed=3", "--address", "http://head:8265", "--no-follow", "--resume", "--json")
    assert json.loads(done.stdout) == {
        "job": "r.yaml",
        "words": ["seed=3"],
        "address": "http://head:8265",
        "follow": False,
        "mode": "resume",
    }


def test_recipe_show_prints_yaml_that_loads_back(invoke: Invoke, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 150 + ".jsonl")
    done = invoke("recipe", "show", "model.base=m", f"data.train={long}")
    assert done.exit_code == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(done.stdout)
    again = invoke("recipe", "show", str(shown), "--json")
    answer = json.loads(again.stdout)
    assert answer["recipe"]["data"]["train"][0]["path"] == str(long)
    assert answer["origin"]["model.base"] == "user"


def test_recipe_validate(invoke: Invoke) -> None:
    good = invoke("recipe", "validate", *MINIMAL)
    assert (good.exit_code, good.stdout) == (0, "the recipe is valid\n")
    bad = invoke("recipe", "validate", *MINIMAL, "adapter.r=3", "--json")
    assert bad.exit_code == 2
    assert json.loads(bad.stdout)["error"]["id"] == "R104"
    missing = invoke("recipe", "validate", "nowhere.yaml")
    assert (missing.exit_code, missing.stderr[:4]) == (2, "R101")


def test_recipe_schema(invoke: Invoke) -> None:
    schema = json.loads(invoke("recipe", "schema").stdout)
    assert schema["required"] == ["model", "data"]


def test_models_list_names_the_licence(invoke: Invoke) -> None:
    (model,) = json.loads(invoke("models", "list", "--json").stdout)["models"]
    assert (model["name"], model["licence"]) == ("smollm2-135m-instruct", "Apache-2.0")
    assert "Apache-2.0" in invoke("models", "list").stdout


def test_models_pull_prints_the_folder(invoke: Invoke, tiny_model_folder: str) -> None:
    assert json.loads(invoke("models", "pull", tiny_model_folder, "--json").stdout)["folder"] == tiny_model_folder
    missing = invoke("models", "pull", "./nowhere")
    assert missing.exit_code == 2
    assert missing.stderr.startswith("R3")


def test_runs(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayft.config import load
    from rayft.runs.folder import RunFolder

    monkeypatch.chdir(tmp_path)
    assert invoke("runs", "list").stdout == "no runs yet\n"
    with RunFolder.create(load(None, [*MINIMAL, "name=one"]), "train") as run:
        run.append_metrics({"step": 1, "loss": 2.0})
        run.finish("finished")
        run.release()

    (listed,) = json.loads(invoke("runs", "list", "--json").stdout)["runs"]
    assert (listed["name"], listed["state"], listed["last_step"]) == ("one", "finished", 1)
    assert "one" in invoke("runs", "list").stdout
    assert json.loads(invoke("runs", "show", "run:one", "--json").stdout)["name"] == "one"
    unknown = invoke("runs", "show", "two")
    assert (unknown.exit_code, unknown.stderr[:4]) == (2, "R410")

    assert invoke("runs", "rm", "one").exit_code == 1  # nobody said yes
    assert (tmp_path / "runs/one/run.json").exists()
    assert invoke("runs", "rm", "one", "--yes").exit_code == 0
    assert not (tmp_path / "runs/one").exists()


def test_quiet_leaves_the_user_s_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    quiet()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
