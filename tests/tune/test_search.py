"""A whole sweep in this process, without a cluster: what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayft.config import load
from rayft.errors import RunFailed, RunStopped, UsageError
from rayft.runs import reference
from rayft.runs.folder import RunFolder
from rayft.train import fit
from rayft.tune import search
from rayft.tune.study import Study
from rayft.tune.worker import RunFiles
from tests.train.conftest import Recipes
from tests.tune.test_study import trials_of

pytestmark = pytest.mark.long

SPACE: dict[str, Any] = {"train.learning_rate": {"loguniform": [1e-4, 1e-3]}, "adapter.rank": {"choice": [2, 4]}}
SMALL = {"train.max_steps": 6, "train.eval_steps": 2, "data.validation": 0.25}


def sweep(recipe: Recipes, /, recipe_changes: dict[str, Any] | None = None, **tune: Any) -> dict[str, Any]:
    section = {"space": SPACE, "num_samples": 4, "scheduler_args": {"grace_period": 2}} | tune
    return recipe(**SMALL | {"name": "sweep", "tune": section} | (recipe_changes or {}))


def test_what_a_sweep_leaves(recipe: Recipes) -> None:
    result = search(sweep(recipe), quiet=True)
    run = Path(result.path)
    folder = RunFolder.open(run)
    assert folder.state == "finished" and folder.record.verb == "tune"
    assert len(result.rows) == 4 and {row.state for row in result.rows} <= {"complete", "pruned"}
    complete = {row.number: row.metrics["validation_loss"] for row in result.rows if row.state == "complete"}
    assert result.best == min(complete, key=complete.__getitem__)
    assert result.metrics["validation_loss"] == complete[result.best]
    assert (run / "report.md").is_file() and f"trial {result.best}" in (run / "report.md").read_text()
    assert (run / "study.journal").is_file() and len(trials_of(run)) == 4
    assert [trial.number for trial in trials_of(run) if trial.state.name == "COMPLETE"] == list(complete)

    grid = result.result_grid
    best = grid.get_best_result(filter_nan_and_inf=True)
    assert len(grid) == 4 and best.metrics is not None
    assert grid[result.best].metrics["validation_loss"] == complete[result.best]  # type: ignore[index]

    ours = reference.resolve("run:sweep", str(run.parent))
    assert ours.kind == "adapter" and ours.path == str(run / "adapter")
    of_trial = reference.resolve(f"run:sweep@trial-{result.best}", str(run.parent))
    assert ours.content_hash == of_trial.content_hash
    second = search(sweep(recipe), mode="new", quiet=True)
    assert second.name == "sweep-2" and [trial.number for trial in trials_of(Path(second.path), "sweep-2")] == [
        0,
        1,
        2,
        3,
    ]
    assert search(sweep(recipe), mode="resume", quiet=True).rows == result.rows, "a finished sweep is not run again"


def test_best_yaml_trains_the_winner_again(recipe: Recipes) -> None:
    result = search(sweep(recipe, scheduler="none"), quiet=True)
    again = fit(Path(result.path) / "best.yaml", answer=None, quiet=True)
    assert again.name == "sweep-best"
    history = dict(result.rows[result.best].history)
    rows = {
        row["step"]: row["validation_loss"] for row in RunFolder.open(again.path).metrics() if "validation_loss" in row
    }
    assert rows == pytest.approx(history, abs=2e-6)
    ours, theirs = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (result.folder, again.folder))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-3


def test_classic_mode_finds_the_same(recipe: Recipes) -> None:
    packed = search(sweep(recipe, scheduler="none", search_alg="qmc"), quiet=True)
    classic = search(
        sweep(recipe, {"name": "classic"}, scheduler="none", search_alg="qmc", execution="classic"), quiet=True
    )
    assert [row.values for row in classic.rows] == [row.values for row in packed.rows]
    for ours, theirs in zip(packed.rows, classic.rows, strict=True):
        assert dict(ours.history) == pytest.approx(dict(theirs.history), abs=1e-5)
        assert ours.facts["trainable_parameters"] == theirs.facts["trainable_parameters"]
    assert classic.best == packed.best
    assert reference.resolve("run:classic", str(Path(classic.path).parent)).kind == "adapter"
    assert reference.resolve("run:classic@trial-0", str(Path(classic.path).parent)).kind == "adapter"


def test_full_fine_tuning_is_classic(recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    result = search(sweep(recipe, {"adapter": None}, space=space, num_samples=2))
    assert reference.resolve("run:sweep@trial-0", str(Path(result.path).parent)).kind == "model"
    assert result.kind == "model" and (Path(result.path) / "model" / "config.json").is_file()
    assert "classic: not every point of the space suits a pack: adapter" in capsys.readouterr().out


def test_a_classic_trial_is_stopped_at_a_rung(recipe: Recipes) -> None:
    points = [{"train.learning_rate": 1e-2, "adapter.rank": 4}, {"train.learning_rate": 1e-9, "adapter.rank": 4}]
    space = SPACE | {"train.learning_rate": {"loguniform": [1e-9, 1e-1]}}
    long = {"train.max_steps": 400, "train.eval_steps": 20}
    result = search(
        sweep(
            recipe,
            long,
            space=space,
            points_to_evaluate=points,
            num_samples=2,
            execution="classic",
            scheduler_args={"grace_period": 20, "max_t": 400, "reduction_factor": 2},
        ),
        quiet=True,
    )
    assert [row.state for row in result.rows] == ["complete", "pruned"]
    assert result.rows[1].step < 400
    assert reference.resolve("run:sweep@trial-1", str(Path(result.path).parent)).kind == "adapter"


def test_default_space(recipe: Recipes) -> None:
    automatic = sweep(recipe, {"model.dtype": "auto"}, space={}, num_samples=1)
    result = search(automatic, quiet=True)
    (row,) = result.rows
    assert row.values["train.learning_rate"] == pytest.approx(5e-4 * (2000 / 64) ** 0.781)
    assert row.values["adapter.target_modules"] == "all-linear"
    assert result.best_recipe.model.dtype != "auto", "best.yaml says in which number format the winner was trained"
    assert search(automatic, mode="resume", quiet=True).best == 0
    stored = RunFolder.open(result.path).recipe()
    assert stored.tune is not None and "adapter.rank" in stored.tune.space


def test_several_objectives(recipe: Recipes) -> None:
    result = search(sweep(recipe, metrics=["validation_loss", "trainable_parameters"], num_samples=3), quiet=True)
    assert all(row.state == "complete" for row in result.rows)
    assert set(result.metrics) >= {"validation_loss", "trainable_parameters"}


def test_infeasible_trials_do_not_win(recipe: Recipes) -> None:
    space = {"adapter.rank": {"grid_search": [2, 32]}}
    free = search(sweep(recipe, space=space, search_alg="grid", scheduler="none"), quiet=True)
    sizes = [row.facts["trainable_parameters"] for row in free.rows]
    bound = {"trainable_parameters": (min(sizes) + max(sizes)) / 2}
    held = {"name": "held"}
    result = search(
        sweep(recipe, held, space=space, search_alg="grid", scheduler="none", constraints=bound), quiet=True
    )
    assert result.rows[result.best].values["adapter.rank"] == 2


def test_repeats_with_other_seeds(recipe: Recipes) -> None:
    result = search(sweep(recipe, repeats=2, num_samples=4, scheduler="none"), quiet=True)
    text = Path(result.report).read_text()
    assert "Repeats with other seeds" in text
    known = RunFolder.open(result.path).record.facts["repeats"]
    assert len(known) == 6 and len(set(known.values())) == 6
    assert sorted(int(item.name) for item in (Path(result.path) / "trials").iterdir()) == [0, 1, 2, 3]


def test_no_trial_with_a_result(recipe: Recipes) -> None:
    space = {"train.learning_rate": {"choice": [1e38]}, "train.optim": "sgd", "train.max_grad_norm": 0}
    with pytest.raises(RunFailed, match=r"R740.*trial 0: .*not finite"):
        search(sweep(recipe, space=space, num_samples=2), quiet=True)
    folder = RunFolder.open(load(recipe()).recipe.storage + "/sweep")
    assert folder.state == "failed" and (folder.location / "report.md").is_file()


def test_a_stopped_sweep_is_resumed(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = search(sweep(recipe, {"name": "calm"}, num_samples=4, scheduler="none", pack_size=2), quiet=True)
    reports = Study.report

    def stop_after_three(self: Study, *arguments: Any) -> Any:
        answer = reports(self, *arguments)
        if len(json.dumps([row.history for row in self.rows()]).split("], [")) > 3:
            self.request_stop()
        return answer

    monkeypatch.setattr("rayft.tune.lane.POLL_SECONDS", 0.0)
    monkeypatch.setattr(Study, "report", stop_after_three)
    with pytest.raises(RunStopped, match="R742"):
        search(sweep(recipe, num_samples=4, scheduler="none", pack_size=2), quiet=True)
    monkeypatch.setattr(Study, "report", reports)
    folder = RunFolder.open(Path(calm.path).parent / "sweep")
    assert folder.state == "stopped"
    with pytest.raises(UsageError, match="R402"):
        search(sweep(recipe, num_samples=4, scheduler="none", pack_size=2), quiet=True)
    result = search(sweep(recipe, num_samples=4, scheduler="none", pack_size=2), mode="resume", quiet=True)
    assert [row.state for row in result.rows] == ["complete"] * 4
    first = [row.values for row in calm.rows[:2]]
    assert [row.values for row in result.rows[:2]] == first
    for ours, theirs in zip(result.rows[:2], calm.rows[:2], strict=True):
        assert dict(ours.history) == pytest.approx(dict(theirs.history), abs=1e-5)
    log = [row for row in RunFolder.open(result.path).metrics() if row["event"] == "report"]
    assert len({(row["trial"], row["trial_step"]) for row in log}) == len(log) == 12


def test_a_lane_that_dies_at_the_end_of_a_trial_leaves_no_checkpoint(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial was counted and nobody trains it any more, so no lane comes to clean up after it."""
    monkeypatch.setattr(RunFiles, "forget", lambda self, number: None)
    plain = sweep(recipe, num_samples=2, scheduler="none")
    result = search(plain, quiet=True)
    assert [row.state for row in result.rows] == ["complete"] * 2
    assert not list(Path(result.path).glob("trials/*/state.pt"))


def test_a_stopped_classic_sweep_is_resumed(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sweep(
        recipe, {"train.max_steps": 300, "train.eval_steps": 30}, num_samples=2, scheduler="none", execution="classic"
    )
    reports = Study.report

    def stop_at_once(self: Study, *arguments: Any) -> Any:
        self.request_stop()
        return reports(self, *arguments)

    monkeypatch.setattr(Study, "report", stop_at_once)
    with pytest.raises(RunStopped, match="R742"):
        search(plain, quiet=True)
    monkeypatch.setattr(Study, "report", reports)
    run = Path(plain["storage"], "sweep")
    steps = RunFolder.open(run / "trials" / "0").checkpoints()
    assert 0 < max(steps) < 300 and trials_of(run)[0].state.name == "RUNNING"
    result = search(plain, mode="resume", quiet=True)
    assert [(row.state, row.step) for row in result.rows] == [("complete", 300)] * 2
    first = [row for row in RunFolder.open(run).metrics() if row["trial"] == 0 and row["event"] == "report"]
    assert [row["trial_step"] for row in first] == list(range(30, 301, 30)), "nothing twice, nothing left out"


@pytest.mark.parametrize(
    ("tune", "id", "says"),
    [
        ({"metric": "validation_los"}, "R723", "did you mean validation_loss?"),
        ({"metric": "exact_match"}, "R723", "known: validation_loss"),
        ({"constraints": {"memory": 1}}, "R723", "'memory'"),
        ({"space": {"adapter.rnk": {"choice": [1]}}}, "R720", "adapter.rank"),
        ({"space": {"adapter.use_dora": {"choice": [True, False]}}, "execution": "pack"}, "R724", "adapter.use_dora"),
        ({"space": {"model.quantization": {"choice": [None, "nf4"]}}, "execution": "pack"}, "R724", "model"),
    ],
)
def test_refused_before_anything_starts(recipe: Recipes, tune: dict[str, Any], id: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        search(sweep(recipe, **tune), quiet=True)
    assert caught.value.id == id
    assert says in f"{caught.value.message} {caught.value.hint}"
    assert not Path(load(recipe()).recipe.storage, "sweep").exists()


def test_nothing_held_out(recipe: Recipes) -> None:
    changes = {"data.validation": None, "train.eval_steps": None}
    with pytest.raises(UsageError, match=r"R723.*validation_loss"):
        search(sweep(recipe, changes), quiet=True)
    result = search(sweep(recipe, changes, metric="loss", num_samples=2), quiet=True)
    assert result.metrics["loss"] > 0


def test_dashboard(recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    search(sweep(recipe, num_samples=1), dashboard=True)
    assert "Optuna Dashboard: http://127.0.0.1:" in capsys.readouterr().out
