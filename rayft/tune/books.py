"""Optuna's books of a sweep: each trial with its parameters, reports, state, constraints and attributes as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from rayft.config.tune import Tune
from rayft.errors import UsageError
from rayft.tune.record import Record, Report
from rayft.tune.rows import State
from rayft.tune.space import Space, Values
from rayft.tune.storage import open_study

INVALID_IN_A_ROW = 100
STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class Books:
    """Asks Optuna for points and tells it what became of them."""

    def __init__(self, tune: Tune, space: Space, name: str, folder: Path, seed: int, *, resume: bool) -> None:
        """Raises UsageError R730, R731 (see `open_study`) and R732: begun with another space."""
        self.tune, self.space = tune, space
        self.study = open_study(tune, name, folder, seed, resume=resume)
        self._open: dict[int, Trial] = {}
        self._agree()

    def queue(self, points: Sequence[Values]) -> None:
        """Points to propose first; nothing happens when the study has begun already."""
        if not self.study.get_trials(deepcopy=False):
            for point in points:
                self.study.enqueue_trial(self.space.encode(point))

    def ask(self) -> Record:
        """A new trial. Points that are no valid recipe end as FAIL and are not counted.

        Raises UsageError R721 after a hundred of them in a row.
        """
        reason = ""
        for _ in range(INVALID_IN_A_ROW):
            trial = self.study.ask()
            values = self.space.ask(trial)
            try:
                self.space.recipe(values)
            except UsageError as error:
                reason = error.message
                trial.set_user_attr("invalid", reason)
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("values", json.dumps(values))
            self._open[trial.number] = trial
            return Record(trial.number, values)
        raise UsageError("R721", f"tune.space: {INVALID_IN_A_ROW} proposals in a row are invalid: {reason}")

    def note(self, number: int, name: str, value: Any) -> None:
        """Keep a user attribute of an open trial."""
        self._open[number].set_user_attr(name, value)

    def report(self, number: int, report: Report) -> None:
        """An intermediate value; Optuna has none for several objectives."""
        value = report.metrics.get(self.tune.objectives[0][0])
        if len(self.tune.objectives) == 1 and value is not None and math.isfinite(value):
            self._open[number].report(value, report.step)

    def close(self, record: Record) -> None:
        """The end of a trial: a pruned one has the value of its last report, a failed one none."""
        trial = self._open.pop(record.number)
        for name, value in {**record.facts, "seconds": record.seconds, "lane": record.lane}.items():
            trial.set_user_attr(name, value)
        for name, bound in self.tune.constraints.items():
            measured = record.objective(name)
            if measured is not None:
                trial.set_constraint(name, measured - bound)
        values = [value for metric, _ in self.tune.objectives if (value := record.objective(metric)) is not None]
        self.study.tell(trial, values if record.state == "complete" else None, state=STATES[record.state])

    def distributions(self) -> dict[str, BaseDistribution]:
        """Path -> distribution of everything that was asked for."""
        return {
            path: found
            for trial in self.study.get_trials(deepcopy=False)
            for path, found in trial.distributions.items()
        }

    # After a resume

    def records(self) -> Iterator[Record]:
        """The trials that a former owner left, ended and open ones. One that it had not finished asking for fails."""
        for frozen in self.study.get_trials(deepcopy=False):
            if "values" in frozen.user_attrs:
                yield self._record(frozen)
            elif frozen.state == TrialState.RUNNING:
                self.study.tell(frozen.number, state=TrialState.FAIL)

    def catch_up(self, record: Record) -> None:
        """Tell what the former owner had written into its log, but not here, when it died; the other way round for a
        log that is gone."""
        told = self.study.get_trials(deepcopy=False)[record.number].intermediate_values
        if not record.reports:
            metric = self.tune.objectives[0][0]
            record.reports = [Report(step, {metric: value}, "continue") for step, value in sorted(told.items())]
        if record.number not in self._open:
            return
        for report in record.reports:
            if report.step not in told:
                self.report(record.number, report)
        if record.state in STATES:
            self.close(record)

    def _record(self, frozen: FrozenTrial) -> Record:
        attributes = frozen.user_attrs
        record = Record(frozen.number, json.loads(attributes["values"]))
        record.total_steps = attributes.get("total_steps", 0)
        record.seconds = attributes.get("seconds", 0.0)
        if "checkpoint" in attributes:
            path, step = attributes["checkpoint"]
            record.checkpoint = (path, step)
        record.state = next((state for state, theirs in STATES.items() if theirs == frozen.state), "waiting")
        if frozen.state == TrialState.RUNNING:
            self._open[frozen.number] = optuna.trial.Trial(self.study, frozen._trial_id)
        return record

    def _agree(self) -> None:
        """Raises UsageError R732 when the study was begun with another space or other objectives."""
        described = {path: item.model_dump(mode="json") for path, item in self.space.distributions.items()}
        mine = json.dumps({"space": described, "objectives": self.tune.objectives})
        if self.study.user_attrs.get("space", mine) != mine:
            raise UsageError(
                "R732",
                f"the study {self.study.study_name!r} was begun with another space or other objectives",
                "take tune.space and tune.metric back, or begin another sweep with --new",
            )
        self.study.set_user_attr("space", mine)
