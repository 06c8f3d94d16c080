"""The owner of a sweep: its books are Optuna's, its decisions Ray's, and it can be killed at any time."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from rayft.errors import UsageError
from rayft.runs.lines import read_lines
from rayft.runs.storage import locate
from rayft.tune.record import Proposal
from rayft.tune.storage import JOURNAL
from rayft.tune.study import LOG, Study
from tests.tune.conftest import MakeStudy, sweep


def loss_of(values: Any) -> float:
    return float(
        (math.log10(values["train.learning_rate"]) + 3) ** 2 + values["adapter.dropout"] + 1 / values["adapter.rank"]
    )


def trials_of(folder: Path, name: str = "sweep") -> list[optuna.trial.FrozenTrial]:
    """The journal, read by Optuna alone."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend)).trials


def train(study: Study, proposal: Proposal, steps: int = 9, start: int = 0) -> str:
    """Report a falling curve; returns how the trial ended."""
    for step in range(start + 1, steps + 1):
        loss = loss_of(proposal.values) + 1 / step
        if study.report(proposal.number, step, {"validation_loss": loss, "tokens": 10.0 * step}) == "stop":
            study.finish(proposal.number, "pruned", {}, {})
            return "pruned"
    study.finish(proposal.number, "complete", {}, {"tokens_per_second": 5.0})
    return "complete"


def test_a_sequential_tpe_study_is_plain_optuna_s(study: MakeStudy) -> None:
    owner = study(num_samples=25, search_alg="tpe")
    found = []
    while (proposal := owner.next("lane-0")) is not None:
        owner.report(proposal.number, 1, {"validation_loss": loss_of(proposal.values)})
        owner.finish(proposal.number, "complete", {}, {})
        found.append(proposal.values)

    def objective(trial: optuna.Trial) -> float:
        return loss_of(
            {
                "train.learning_rate": trial.suggest_float("train.learning_rate", 1e-5, 1e-2, log=True),
                "adapter.rank": trial.suggest_categorical("adapter.rank", [4, 8, 16]),
                "adapter.dropout": trial.suggest_float("adapter.dropout", 0.0, 0.5),
            }
        )

    peer = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3))
    peer.optimize(objective, n_trials=25)
    assert found == [trial.params for trial in peer.trials]


@pytest.mark.parametrize("search_alg", ["gp", "nsga2", "qmc", "random", "cmaes"])
def test_other_samplers(study: MakeStudy, search_alg: str) -> None:
    owner = study(num_samples=4, search_alg=search_alg)
    values = []
    while (proposal := owner.next("lane-0")) is not None:
        train(owner, proposal, steps=1)
        values.append(tuple(proposal.values.items()))
    assert len(set(values)) == 4


def test_decisions_are_those_of_ray_s_asha_on_the_recorded_curves(study: MakeStudy, tmp_path: Path) -> None:
    owner = study(num_samples=20, scheduler="asha", scheduler_args={"grace_period": 1}, budget=9)
    running: dict[int, tuple[Proposal, int]] = {}
    draw = random.Random(0)
    while True:
        while len(running) < 6 and (proposal := owner.next("lane-0")) is not None:
            running[proposal.number] = (proposal, 0)
        if not running:
            break
        number = draw.choice(list(running))
        proposal, step = running[number]
        verdict = owner.report(number, step + 1, {"validation_loss": loss_of(proposal.values) + 1 / (step + 1)})
        running[number] = (proposal, step + 1)
        if verdict == "stop":
            owner.finish(number, "pruned", {}, {})
            del running[number]
    peer = AsyncHyperBandScheduler("step", "validation_loss", "min", max_t=9, grace_period=1, reduction_factor=3)
    trials: dict[int, Trial] = {}
    log = read_lines(locate(tmp_path / LOG))
    for row in log:
        if row["trial"] not in trials:
            trials[row["trial"]] = Trial("peer", stub=True)
            peer.on_trial_add(None, trials[row["trial"]])
        trial = trials[row["trial"]]
        if row["event"] == "report":
            result = {"step": row["trial_step"], "validation_loss": row["validation_loss"]}
            assert row["stop"] == (peer.on_trial_result(None, trial, result) == TrialScheduler.STOP)
        else:
            peer.on_trial_complete(None, trial, result)
    assert {row["event"] for row in log} == {"report", "complete", "pruned"}


def test_states_values_and_attributes_as_they_are(study: MakeStudy, tmp_path: Path) -> None:
    owner = study(
        num_samples=4, scheduler="asha", scheduler_args={"grace_period": 3}, constraints={"peak_memory_gb": 2}
    )
    for number, (state, loss, facts) in enumerate(
        [
            ("complete", 1.0, {"peak_memory_gb": 1.5, "trainable_parameters": 7, "tokens_per_second": 10.0}),
            ("pruned", 2.0, {"peak_memory_gb": 2.5}),
            ("failed", 3.0, {"reason": "the loss is nan"}),
            ("complete", math.nan, {}),
        ]
    ):
        proposal = owner.next("lane-0")
        assert proposal is not None and proposal.number == number
        owner.begun(number, 9, started=True)
        owner.report(number, 1, {"validation_loss": loss + 1})
        owner.report(number, 2, {"validation_loss": loss})
        owner.finish(number, state, {}, facts)  # type: ignore[arg-type]
        owner.finish(number, "failed", {}, {"reason": "a second end is not counted"})
    complete, pruned, failed, broken = trials_of(tmp_path)
    assert [t.state for t in (complete, pruned, failed, broken)] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
    ]
    assert complete.value == 1.0 and complete.intermediate_values == {1: 2.0, 2: 1.0}
    assert pruned.value == 2.0 and pruned.last_step == 2
    assert failed.value is None and failed.user_attrs["reason"] == "the loss is nan"
    assert "not finite" in broken.user_attrs["reason"]
    assert complete.user_attrs["trainable_parameters"] == 7 and complete.user_attrs["tokens_per_second"] == 10.0
    assert complete.constraints == {"peak_memory_gb": -0.5} and pruned.constraints == {"peak_memory_gb": 0.5}
    rows = owner.rows()
    assert [row.state for row in rows] == ["complete", "pruned", "failed", "failed"]
    assert rows[1].facts["infeasible"] == ["peak_memory_gb"] and "infeasible" not in rows[0].facts
    assert rows[0].history == ((1, 2.0), (2, 1.0)) and rows[0].total_steps == 9 and rows[0].step == 2


def test_a_stop_at_the_full_budget_is_complete(study: MakeStudy, tmp_path: Path) -> None:
    owner = study(num_samples=1, scheduler="asha", budget=9)
    proposal = owner.next("lane-0")
    assert proposal is not None and train(owner, proposal, steps=30) == "pruned"
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE and trial.last_step == 9


def test_several_objectives(study: MakeStudy, tmp_path: Path) -> None:
    owner = study(num_samples=2, metrics=["validation_loss", "trainable_parameters"], scheduler="asha")
    for size in (5, 6):
        proposal = owner.next("lane-0")
        assert proposal is not None
        assert owner.report(proposal.number, 1, {"validation_loss": 1.0}) == "continue"
        owner.finish(proposal.number, "complete", {}, {"trainable_parameters": size})
    assert [trial.values for trial in trials_of(tmp_path)] == [[1.0, 5.0], [1.0, 6.0]]
    assert owner.rows()[0].metrics == {"validation_loss": 1.0, "trainable_parameters": 5.0}


def test_given_points_come_first_and_a_grid_is_complete(study: MakeStudy, tmp_path: Path) -> None:
    prior = {"train.learning_rate": 1e-3, "adapter.rank": 4, "adapter.dropout": 0.0}
    owner = study(num_samples=3, points_to_evaluate=[{"adapter.rank": 16}], first=[prior])
    proposals = [owner.next("lane-0") for _ in range(3)]
    assert all(proposals) and owner.next("lane-0") is None
    assert proposals[0] and proposals[0].values["adapter.rank"] == 16
    assert proposals[1] and proposals[1].values == prior and proposals[1].recipe.train.learning_rate == 1e-3


def test_a_grid(study: MakeStudy) -> None:
    space = {"adapter.rank": {"grid_search": [4, 8, 0]}, "adapter.use_rslora": {"choice": [True, False]}}
    owner = study(space=space, search_alg="grid", num_samples=1)
    seen = []
    while (proposal := owner.next("lane-0")) is not None:
        seen.append((proposal.values["adapter.rank"], proposal.values["adapter.use_rslora"]))
    assert sorted(seen) == [(4, False), (4, True), (8, False), (8, True)], "invalid points are left out"


def test_invalid_proposals_are_not_counted(study: MakeStudy, tmp_path: Path) -> None:
    space = {"adapter.rank": {"choice": [3, 4]}, "adapter.init_lora_weights": {"choice": [True, "orthogonal"]}}
    owner = study(space=space, num_samples=12, search_alg="random", seed=1)
    while (proposal := owner.next("lane-0")) is not None:
        assert proposal.values != {"adapter.rank": 3, "adapter.init_lora_weights": "orthogonal"}
        train(owner, Proposal(proposal.number, _as_known(proposal.values), proposal.recipe), steps=1)
    states = [trial.state for trial in trials_of(tmp_path)]
    assert states.count(TrialState.COMPLETE) == 12 and TrialState.FAIL in states
    assert len(owner.rows()) == 12


def _as_known(values: Any) -> dict[str, Any]:
    return {"train.learning_rate": 1e-3, "adapter.dropout": 0.0, "adapter.rank": 4} | values


def test_a_hundred_invalid_proposals_in_a_row(study: MakeStudy) -> None:
    owner = study(space={"adapter.rank": {"randint": [-9, 0]}})
    with pytest.raises(UsageError, match=r"R721.*100 proposals in a row"):
        owner.next("lane-0")


def test_trials_of_a_dead_lane_go_on_from_their_checkpoint(study: MakeStudy) -> None:
    owner = study(num_samples=3)
    held = [owner.next("lane-0"), owner.next("lane-1"), owner.next("lane-0")]
    first, _, third = (proposal for proposal in held if proposal is not None)
    owner.report(first.number, 2, {"validation_loss": 1.0})
    owner.checkpointed(first.number, "/trials/0/state.pt", 2)
    owner.lost("lane-0")
    assert [row.state for row in owner.rows()] == ["waiting", "running", "waiting"]
    again = [owner.next("lane-1"), owner.next("lane-1")]
    assert [proposal.number for proposal in again if proposal] == [first.number, third.number]
    assert again[0] and again[0].checkpoint == "/trials/0/state.pt" and again[0].recipe == first.recipe
    assert again[1] and again[1].checkpoint is None
    assert owner.next("lane-1") is None, "nothing new is proposed instead"


def test_a_trial_that_kills_its_lanes_ends(study: MakeStudy) -> None:
    owner = study(num_samples=1)
    for _ in range(4):
        assert owner.next("lane-0") is not None
        owner.lost("lane-0")
    assert owner.next("lane-0") is None
    (row,) = owner.rows()
    assert row.state == "failed" and row.facts["reason"] == "its lane died 4 times under it"


def test_a_trial_without_room_is_not_held_against_it(study: MakeStudy) -> None:
    owner = study(num_samples=1)
    for _ in range(9):
        proposal = owner.next("lane-0")
        assert proposal is not None
        owner.give_back(proposal.number)
    assert owner.next("lane-0") is not None


def test_the_time_budget(study: MakeStudy) -> None:
    now = [0.0]
    owner = study(num_samples=9, time_budget_s=10, clock=lambda: now[0])
    proposal = owner.next("lane-0")
    assert proposal is not None and owner.report(0, 1, {"validation_loss": 1.0}) == "continue"
    now[0] = 11
    assert owner.next("lane-0") is None and owner.report(0, 2, {"validation_loss": 0.9}) == "stop"
    owner.finish(0, "pruned", {}, {})
    assert owner.rows()[0].seconds == 11 and owner.rows()[0].state == "pruned"


class TestResume:
    """Whatever the former owner had written, the next one goes on there."""

    def test_finished_trials_are_not_repeated(self, study: MakeStudy, tmp_path: Path) -> None:
        first = study(num_samples=6)
        for _ in range(3):
            proposal = first.next("lane-0")
            assert proposal is not None
            train(first, proposal)
        unfinished = first.next("lane-0")
        assert unfinished is not None
        first.report(unfinished.number, 1, {"validation_loss": 5.0})
        first.checkpointed(unfinished.number, "/state", 1)
        before = first.rows()

        second = study(num_samples=6, resume=True)
        assert [row.history for row in second.rows()] == [row.history for row in before]
        assert [row.state for row in second.rows()] == ["complete"] * 3 + ["waiting"]
        assert second.rows()[0].facts == before[0].facts
        numbers = []
        while (proposal := second.next("lane-7")) is not None:
            numbers.append(proposal.number)
            if proposal.number == unfinished.number:
                assert proposal.checkpoint == "/state" and proposal.values == unfinished.values
                assert second.report(proposal.number, 1, {"validation_loss": 5.0}) == "continue"
            train(second, proposal, start=1 if proposal.number == unfinished.number else 0)
        assert numbers == [3, 4, 5]
        trials = trials_of(tmp_path)
        assert [trial.number for trial in trials] == list(range(6))
        assert all(trial.state == TrialState.COMPLETE for trial in trials)
        rows = [
            (row["trial"], row["trial_step"]) for row in read_lines(locate(tmp_path / LOG)) if row["event"] == "report"
        ]
        assert len(rows) == len(set(rows)), "each report stands in the log once"
        values = [tuple(row.values.items()) for row in second.rows()]
        assert len(set(values)) == 6, "the sampler does not draw its first points again"

    def test_rungs_know_what_was_decided(self, tmp_path: Path) -> None:
        resolved = sweep(
            num_samples=12,
            search_alg="qmc",
            scheduler="asha",
            scheduler_args={"grace_period": 1, "reduction_factor": 2},
        )

        def run(folder: Path, kill_after: int | None = None) -> list[tuple[Any, ...]]:
            folder.mkdir()
            owner = Study(resolved, folder, budget=8)
            for count in range(12):
                if count == kill_after:
                    owner.close()
                    owner = Study(resolved, folder, budget=8, resume=True)
                proposal = owner.next("lane-0")
                assert proposal is not None
                train(owner, proposal, steps=8)
            return [(row.state, row.step, row.values) for row in owner.rows()]

        calm = run(tmp_path / "calm")
        assert run(tmp_path / "killed", kill_after=5) == calm
        assert {state for state, *_ in calm} == {"complete", "pruned"}

    def test_the_log_is_ahead_of_optuna(
        self, study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = study(num_samples=2)
        proposal = first.next("lane-0")
        assert proposal is not None
        first.report(0, 1, {"validation_loss": 2.0})
        monkeypatch.setattr(first._books, "report", lambda *_: None)
        monkeypatch.setattr(first._books, "close", lambda *_: None)
        first.report(0, 2, {"validation_loss": 1.0})
        first.finish(0, "complete", {}, {"tokens_per_second": 3.0})
        assert trials_of(tmp_path)[0].state == TrialState.RUNNING, "killed before Optuna was told"
        second = study(num_samples=2, resume=True)
        (trial,) = trials_of(tmp_path)
        assert trial.state == TrialState.COMPLETE and trial.value == 1.0
        assert trial.intermediate_values == {1: 2.0, 2: 1.0} and trial.user_attrs["tokens_per_second"] == 3.0
        assert second.rows()[0].state == "complete"

    def test_killed_while_a_trial_was_proposed(self, study: MakeStudy, tmp_path: Path) -> None:
        first = study(num_samples=2)
        first._books.study.ask()
        second = study(num_samples=2, resume=True)
        proposals = [second.next("lane-0"), second.next("lane-0"), second.next("lane-0")]
        assert [proposal.number for proposal in proposals if proposal] == [1, 2]
        assert trials_of(tmp_path)[0].state == TrialState.FAIL

    def test_without_its_log_no_trial_is_repeated(self, study: MakeStudy, tmp_path: Path) -> None:
        first = study(num_samples=2)
        proposal = first.next("lane-0")
        assert proposal is not None
        train(first, proposal, steps=2)
        first.close()
        (tmp_path / LOG).unlink()
        second = study(num_samples=2, resume=True)
        assert [row.state for row in second.rows()] == ["complete"] and len(second.rows()[0].history) == 2

    def test_another_space(self, study: MakeStudy) -> None:
        study()
        with pytest.raises(UsageError, match="R732"):
            study(resume=True, space={"adapter.rank": {"choice": [4]}})
        study(resume=True, num_samples=99, lanes=3)

    def test_a_name_in_use(self, study: MakeStudy) -> None:
        study()
        with pytest.raises(UsageError, match=r"R731.*'sweep'"):
            study()

    def test_a_second_process(self, study: MakeStudy, tmp_path: Path) -> None:
        study()
        with pytest.raises(UsageError, match="R406"):
            Study(sweep(), tmp_path, budget=9, resume=True, patience=0)

    def test_a_torn_last_line_is_cut_off(self, study: MakeStudy, tmp_path: Path) -> None:
        study().next("lane-0")
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(b'{"op_code": 5, "tri')
        second = study(resume=True)
        assert len(second.rows()) == 1 and second.next("lane-0") is not None
        assert len(trials_of(tmp_path)) == 1

    def test_a_killed_process_s_lock_does_not_last(self, study: MakeStudy, tmp_path: Path) -> None:
        study().next("lane-0")
        (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / JOURNAL)
        assert study(resume=True).next("lane-0") is not None

    @pytest.mark.parametrize("damage", [b"not json\n", b'{"op_code": 99}\n', b"\x00\x00\n"])
    def test_a_corrupt_journal(self, study: MakeStudy, tmp_path: Path, damage: bytes) -> None:
        study().next("lane-0")
        journal = tmp_path / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([lines[0], damage, *lines[1:]]))
        with pytest.raises(UsageError, match=r"R730.*study.journal cannot be read") as caught:
            study(resume=True)
        assert "--overwrite" in (caught.value.hint or "")

    def test_a_database(self, study: MakeStudy, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/study.db"
        first = study(study_storage=url, num_samples=2)
        proposal = first.next("lane-0")
        assert proposal is not None
        train(first, proposal)
        second = study(study_storage=url, num_samples=2, resume=True)
        assert [row.state for row in second.rows()] == ["complete"]
        assert optuna.load_study(study_name="sweep", storage=url).trials[0].state == TrialState.COMPLETE
        with pytest.raises(UsageError, match="R730"):
            study(study_storage="sqlite:////nowhere/at/all.db")
