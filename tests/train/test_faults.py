"""What goes wrong in a run of one process, and that the run ends as an undisturbed one does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import RunFailed, RunStopped
from rayft.runs.folder import RunFolder
from rayft.train import TrainResult, fit
from tests.train import faults
from tests.train.conftest import Recipes
from tests.train.curves import Curve, assert_same, curve_of

pytestmark = pytest.mark.long

Faulty = Callable[..., dict[str, Any]]


@pytest.fixture
def faulty(recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """`faulty("crash_once", **changes)`: a recipe with dropout whose loss function goes wrong at its moment."""
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))

    def make(function: str, /, **changes: Any) -> dict[str, Any]:
        fault: dict[str, Any] = {"train.loss_function": f"{faults.__file__}:{function}"}
        # One call of the loss function per step: the rows of a step fit into one chunk.
        fault |= {"data.prompt_loss_weight": 0.0, "adapter.dropout": 0.1, "train.save_steps": 4}
        return recipe(**({"name": function.replace("_", "-")} | fault | changes))

    return make


def train(plain: dict[str, Any], **options: Any) -> TrainResult:
    return fit(plain, answer=None, quiet=True, **options)


def weights_hash(result: TrainResult) -> str:
    file = next(Path(result.folder).glob("*.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def events(path: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder.open(path).events() if event["kind"] == kind]


def assert_identical(one: TrainResult, other: TrainResult) -> None:
    assert curve_of(one.path) == curve_of(other.path)
    assert weights_hash(one) == weights_hash(other)


def test_a_crash_is_retried_from_the_checkpoint_bit_for_bit(faulty: Faulty) -> None:
    undisturbed = train(faulty("plain"))
    crashed = train(faulty("crash_once"))
    assert_identical(crashed, undisturbed)
    (restart,) = events(crashed.path, "restart")
    assert restart["step"] == 8 and "crash at call 11" in restart["reason"]


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(faulty: Faulty) -> None:
    undisturbed = train(faulty("plain"))
    plain = faulty("interrupt_once")
    with pytest.raises(RunStopped) as stopped:
        train(plain)
    assert stopped.value.exit_code == 130
    run = RunFolder.open(f"{plain['storage']}/interrupt-once")
    assert run.state == "stopped" and max(run.checkpoints()) == 11
    assert_identical(train(plain, mode="resume"), undisturbed)


def test_a_truncated_checkpoint_is_passed_over(faulty: Faulty) -> None:
    undisturbed = train(faulty("plain"))
    plain = faulty("interrupt_once")
    with pytest.raises(RunStopped):
        train(plain)
    run = RunFolder.open(f"{plain['storage']}/interrupt-once")
    newest = Path(run.checkpoints()[11])
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    resumed = train(plain, mode="resume")
    assert_identical(resumed, undisturbed)
    assert events(resumed.path, "restart")[-1]["step"] == 8


def test_an_error_that_repeats_at_its_step_is_not_retried(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_TEST_ROWS", "1")
    plain = faulty("crash_always", **{"scale.max_failures": -1})
    with pytest.raises(RunFailed, match=r"R603.*same error twice at step 0"):
        train(plain)
    assert len(events(f"{plain['storage']}/crash-always", "failure")) == 2
    assert RunFolder.open(f"{plain['storage']}/crash-always").state == "failed"


def test_out_of_memory_halves_the_micro_batch(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_TEST_ROWS", "10000")
    no_dropout = {"adapter.dropout": 0.0}  # masks belong to rows of a batch, so another batch draws others
    undisturbed = train(faulty("out_of_memory", name="enough", **no_dropout))
    monkeypatch.setenv("RAYFT_TEST_ROWS", "150")
    small = train(faulty("out_of_memory", **no_dropout))
    assert_same(curve_of(small.path), curve_of(undisturbed.path))
    assert [event["cause"] for event in events(small.path, "failure")] == ["oom"]
    assert events(small.path, "started")[-1]["micro_batch_size"] == 2


def test_out_of_memory_in_an_evaluation_too(faulty: Faulty) -> None:
    validated = {"data.validation": 0.3, "train.max_steps": 4, "train.eval_steps": 2}
    small = train(faulty("out_of_memory_in_evaluation", **validated))
    assert [event["cause"] for event in events(small.path, "failure")] == ["oom"]
    assert events(small.path, "started")[-1]["micro_batch_size"] == 2
    assert [row["step"] for row in RunFolder.open(small.path).metrics() if "validation_loss" in row] == [2, 4]


def test_a_report_that_fails_costs_no_model(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rayft.train.plots.plot_run", lambda *words, **options: 1 / 0)
    result = train(recipe(**{"train.max_steps": 2}))
    assert result.state == "finished" and weights_hash(result)
    assert "report.md of run 'test' could not be written: ZeroDivisionError" in caplog.text


def test_out_of_memory_with_one_example_names_remedies(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_TEST_ROWS", "1")
    with pytest.raises(RunFailed, match=r"R601.*measured peak was \d+\.\d GB") as failed:
        train(faulty("out_of_memory"))
    assert all(remedy in str(failed.value.hint) for remedy in ("max_length", "gradient_checkpointing", "nf4"))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(faulty: Faulty) -> None:
    plain = faulty("nan_once")
    with pytest.raises(RunFailed, match=r"R602.*diverged at step 11"):
        train(plain)
    run = RunFolder.open(f"{plain['storage']}/nan-once")
    assert run.state == "failed" and max(run.checkpoints()) == 8


def test_nan_rolls_back_with_half_the_rate(faulty: Faulty) -> None:
    undisturbed = train(faulty("plain"))
    result = train(faulty("nan_once", **{"train.on_divergence": "rollback"}))
    rates = [row["learning_rate"] for row in RunFolder.open(result.path).metrics()]
    normal = [row["learning_rate"] for row in RunFolder.open(undisturbed.path).metrics()]
    assert rates[:8] == normal[:8]
    assert rates[8:] == pytest.approx([rate / 2 for rate in normal[8:]])
    assert len(rates) == 20 and events(result.path, "divergence")


def test_nan_is_only_reported_where_asked(faulty: Faulty) -> None:
    result = train(faulty("nan_once", **{"train.on_divergence": "warn"}))
    rows = RunFolder.open(result.path).metrics()
    assert len(rows) == 20 and rows[10]["loss"] is None


def test_early_stopping_keeps_the_best(recipe: Recipes) -> None:
    plain = recipe(**{
        "data.validation": 0.3, "train.eval_steps": 2, "train.early_stopping_patience": 2, "train.max_steps": 200,
        "train.learning_rate": 0.05, "train.load_best_model_at_end": True, "train.save_total_limit": 2,
    })  # fmt: skip
    result = train(plain)
    run = RunFolder.open(result.path)
    rows = [row for row in run.metrics() if "validation_loss" in row]
    best = min(rows, key=lambda row: row["validation_loss"])
    assert rows[-1]["step"] < 200 and rows[-1]["step"] - best["step"] >= 4
    assert run.record.facts["result_step"] == best["step"]
    assert best["step"] in run.checkpoints() and rows[-1]["step"] in run.checkpoints() and len(run.checkpoints()) <= 3


def test_an_interrupted_overwrite_loses_nothing(faulty: Faulty) -> None:
    first = train(faulty("plain"))
    before = weights_hash(first)
    with pytest.raises(RunFailed):
        train(faulty("nan_once", name="plain", **{"train.save_steps": 1000}), mode="overwrite")
    (trash,) = Path(first.path).parent.glob(".trash-plain*")
    kept = next((trash / "adapter").glob("*.safetensors"))
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == before


def test_curves_are_compared_at_all() -> None:
    with pytest.raises(AssertionError):
        assert_same(Curve([1.0], [1.0]), Curve([1.00001], [1.0]))


def test_tensorboard_has_every_step_once_after_a_crash(faulty: Faulty) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(faulty("crash_once", **{"train.report_to": ["tensorboard"]}))
    board = EventAccumulator(f"{result.path}/tensorboard")
    board.Reload()
    logged = {event.step: event.value for event in board.Scalars("loss")}
    assert logged == pytest.approx(dict(enumerate(curve_of(result.path).losses, start=1)))
