"""The loop of a lane with a real pack on the tiny model, in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

from rayft.config import load
from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved
from rayft.data import Prepared
from rayft.data.prepare import prepare
from rayft.multilora.pack import Pack
from rayft.runs.folder import RunFolder
from rayft.train import fit
from rayft.tune import lane as lane_module
from rayft.tune.capacity import Capacity
from rayft.tune.lane import Lane, Need
from rayft.tune.study import Study
from rayft.tune.worker import RunFiles
from tests.train.conftest import Recipes
from tests.tune.test_study import trials_of

SPACE: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "adapter.rank": {"choice": [2, 4, 8]},
    "train.global_batch_size": {"choice": [2, 4]},
}
Made = tuple[Study, Callable[..., Lane], RunFolder]
Make = Callable[..., Made]


@pytest.fixture
def make(recipe: Recipes, tmp_path: Path) -> Make:
    """`make(tune, **recipe)`: a study, a factory of lanes on it and its run folder."""

    def build(tune: dict[str, Any], **changes: Any) -> Made:
        base = {"train.max_steps": 9, "train.eval_steps": 3, "data.validation": 0.25, "tune": {"space": SPACE} | tune}
        resolved: Resolved = load(recipe(**base | changes))
        folder = RunFolder.create(resolved, "tune")
        study = Study(resolved, folder.path, budget=resolved.recipe.train.max_steps or 9)

        def lane(name: str = "lane-0", size: int = 4, owner: Study = study, **options: Any) -> Lane:
            pack = Pack.open(resolved.recipe, resolved.recipe.model.base, device="cpu")

            def data_of(one: Recipe) -> Prepared:
                return prepare(one, pack.tokenizer, str(tmp_path / "data"))

            return Lane(
                name,
                owner,
                pack,
                RunFiles(folder.path),
                Capacity(size, grow=False),
                data_of=data_of,
                need_of=lambda *_: Need(10**9, 10**6),
                **options,
            )

        return study, lane, folder

    return build


@pytest.mark.long
def test_trials_have_the_curves_of_rayft_train(make: Make, recipe: Recipes) -> None:
    study, lane, folder = make({"num_samples": 5, "scheduler": "none"})
    lane(size=3).run()
    rows = study.rows()
    assert [row.state for row in rows] == ["complete"] * 5
    assert all([step for step, _ in row.history] == [3, 6, 9] for row in rows)
    for row in rows[1:3]:
        alone = fit(
            recipe(
                name=f"alone-{row.number}", **{"train.max_steps": 9, "train.eval_steps": 3, "data.validation": 0.25}
            ),
            [f"{path}={value}" for path, value in row.values.items()],
            answer=None,
            quiet=True,
        )
        curve = [
            (entry["step"], entry["validation_loss"])
            for entry in RunFolder.open(alone.path).metrics()
            if "validation_loss" in entry
        ]
        assert [step for step, _ in curve] == [3, 6, 9]
        for (_, ours), (_, theirs) in zip(row.history, curve, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        ours_saved = Path(folder.path, "trials", str(row.number), "adapter/adapter_model.safetensors")
        assert ours_saved.is_file() and Path(alone.folder, "adapter_model.safetensors").is_file()
    assert rows[0].facts["trainable_parameters"] > 0 and rows[0].facts["tokens_per_second"] > 0
    assert rows[0].facts["peak_memory_gb"] == 1.0
    assert not list(Path(folder.path, "trials").glob("*/state.pt")), "checkpoints of ended trials are gone"


def test_losers_make_room_for_new_trials(make: Make) -> None:
    study, lane, folder = make(
        {"num_samples": 8, "scheduler": "asha", "scheduler_args": {"grace_period": 2, "reduction_factor": 2}}
    )
    lane(size=4).run()
    rows = study.rows()
    assert {row.state for row in rows} == {"complete", "pruned"} and len(rows) == 8
    assert {row.step for row in rows if row.state == "pruned"} <= {2, 4, 8}
    assert all(Path(folder.path, "trials", str(row.number), "adapter").is_dir() for row in rows)
    assert [trial.state.name.lower() for trial in trials_of(Path(folder.path), "test")] == [row.state for row in rows]


def test_a_second_lane_goes_on_where_a_dead_one_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, lane, folder = make({"num_samples": 3, "scheduler": "none"}, **{"train.save_steps": 2})
    dying = lane("lane-0", size=2)
    real, count = dying.pack.step, iter(range(100))

    def step() -> Any:
        if next(count) == 5:
            raise ConnectionError("the machine is gone")
        return real()

    monkeypatch.setattr(dying.pack, "step", step)
    with pytest.raises(ConnectionError):
        dying.run()
    study.lost("lane-0")
    waiting = [row for row in study.rows() if row.state == "waiting"]
    assert waiting and list(Path(folder.path, "trials").glob("*/state.pt"))
    second = lane("lane-1", size=2)
    joined = []
    join = second.pack.join

    def watched(name: str, *arguments: Any, **options: Any) -> Any:
        trial = join(name, *arguments, **options)
        joined.append((int(name), trial.step))
        return trial

    monkeypatch.setattr(second.pack, "join", watched)
    second.run()
    assert joined[0][0] == waiting[0].number and joined[0][1] >= 2, "from its checkpoint, not from the start"
    assert [row.state for row in study.rows()] == ["complete"] * 3
    calm_study, calm_lane, _ = make({"num_samples": 3, "scheduler": "none"}, **{"train.save_steps": 2, "name": "calm"})
    calm_lane(size=2).run()
    for row, calm in zip(study.rows(), calm_study.rows(), strict=True):
        assert row.values == calm.values and dict(row.history) == pytest.approx(dict(calm.history), abs=1e-6)
    assert any("lane-0 died" in event for event in study.events())


def test_out_of_memory_halves_the_pack(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, lane, _ = make({"num_samples": 5, "scheduler": "none"})
    small = lane(size=4)
    real, sizes = small.pack.step, []

    def step() -> Any:
        sizes.append(len(small.pack.trials))
        if len(small.pack.trials) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real()

    monkeypatch.setattr(small.pack, "step", step)
    small.run()
    assert sizes[0] == 4 and max(sizes[1:]) == 2
    assert [row.state for row in study.rows()] == ["complete"] * 5, "no trial is lost"
    assert study.events() == ["lane-0: out of memory with 4 adapters, going on with 2"]


def test_one_adapter_out_of_memory_gets_smaller_micro_batches(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, lane, _ = make({"num_samples": 1, "scheduler": "none", "space": {"adapter.rank": {"choice": [2, 4]}}})
    small = lane(size=4)
    real = small.pack.step

    def step() -> Any:
        if small.pack.trials["0"].micro_batch_size > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real()

    monkeypatch.setattr(small.pack, "step", step)
    small.run()
    assert [row.state for row in study.rows()] == ["complete"] and len(study.events()) == 2

    study, lane, _ = make({"num_samples": 1, "scheduler": "none"}, name="never")
    never = lane(size=1)
    monkeypatch.setattr(never.pack, "step", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    never.run()
    (row,) = study.rows()
    assert row.state == "failed" and "out of memory with one example per pass" in row.facts["reason"]


def test_other_errors_are_not_swallowed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lane, _ = make({"num_samples": 1})
    broken = lane()
    monkeypatch.setattr(broken.pack, "step", lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        broken.run()


def test_a_diverged_trial_leaves_alone(make: Make, tmp_path: Path) -> None:
    space = {"train.learning_rate": {"choice": [1e-3, 1e38]}, "train.optim": "sgd", "train.max_grad_norm": 0}
    points = [{"train.learning_rate": 1e-3}, {"train.learning_rate": 1e38}, {"train.learning_rate": 1e-3}]
    study, lane, folder = make({"num_samples": 3, "scheduler": "none", "space": space, "points_to_evaluate": points})
    lane(size=3).run()
    rows = study.rows()
    assert [row.state for row in rows] == ["complete", "failed", "complete"]
    assert "not finite" in rows[1].facts["reason"]
    assert dict(rows[0].history) == pytest.approx(dict(rows[2].history), abs=1e-6)
    assert not Path(folder.path, "trials/1/adapter").exists()
    assert trials_of(Path(folder.path), "test")[1].state == TrialState.FAIL


def test_a_request_to_stop_saves_everything(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "POLL_SECONDS", 0.0)
    study, lane, folder = make({"num_samples": 3, "scheduler": "none"})
    stopped = lane(size=2)
    study.request_stop()
    stopped.run()
    assert [row.state for row in study.rows()] == ["waiting", "waiting"]
    assert len(list(Path(folder.path, "trials").glob("*/state.pt"))) == 2
    study._stopping = False
    lane(size=2).run()
    assert [row.state for row in study.rows()] == ["complete"] * 3


def test_memory_bounds_the_pack(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, lane, _ = make({"num_samples": 4, "scheduler": "none"})
    bounded = lane(size=4, memory=2.5e6)
    real, sizes = bounded.pack.step, []

    def step() -> Any:
        sizes.append(len(bounded.pack.trials))
        return real()

    monkeypatch.setattr(bounded.pack, "step", step)
    bounded.run()
    assert max(sizes) == 2 and len(study.rows()) == 4


def test_a_trial_that_cannot_share_the_pack_fails_with_the_reason(make: Make) -> None:
    study, lane, _ = make(
        {"num_samples": 2, "search_alg": "grid", "space": {"adapter.use_dora": {"choice": [True, False]}}}
    )
    lane().run()
    assert sorted(row.state for row in study.rows()) == ["complete", "failed"]
    reasons = [row.facts["reason"] for row in study.rows() if row.state == "failed"]
    assert "R804" in reasons[0] and "adapter.use_dora" in reasons[0]


def test_training_loss_is_a_metric_too(make: Make) -> None:
    study, lane, _ = make({"num_samples": 1, "metric": "loss"}, **{"data.validation": None, "train.eval_steps": None})
    lane().run()
    (row,) = study.rows()
    assert row.state == "complete" and math.isfinite(row.metrics["loss"]) and "validation_loss" not in row.metrics
