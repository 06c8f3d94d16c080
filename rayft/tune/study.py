"""The owner of a sweep: what is proposed, what the rungs decide, and who trains which trial.

Plain Python without a cluster; the driver starts it as an actor that the lanes ask. Every report and every end stands
in `metrics.jsonl` before Optuna is told, so whatever dies, the next owner knows as much as this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution

from rayft.config.resolve import Resolved
from rayft.config.tune import Tune
from rayft.runs.metrics import MetricsLog
from rayft.runs.storage import locate, lock
from rayft.tune.books import STATES, Books
from rayft.tune.record import Exploit, Proposal, Record, Report, Verdict
from rayft.tune.rows import TrialRow
from rayft.tune.schedulers import scheduler_of
from rayft.tune.space import Space, Values
from rayft.tune.words import shown

LOG = "metrics.jsonl"
LOCK = "study.lock"
_NO_SCALARS = ("step", "time", "trial", "event", "trial_step", "stop", "lane", "facts")
"""Keys of a row of the log that are not scalars of a trial; `step` counts the rows."""

Ended = Literal["complete", "pruned", "failed"]


class Study:
    """Proposes trials, stops them at rungs, and hands those of dead lanes out again."""

    def __init__(
        self,
        resolved: Resolved,
        folder: str | Path,
        *,
        budget: float,
        name: str | None = None,
        space: Space | None = None,
        first: Sequence[Values] = (),
        resume: bool = False,
        log: str | None = None,
        patience: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """folder: local, for the journal; log: path or URI of metrics.jsonl, by default in `folder`. budget: age of a
        trial at its end, in `scheduler_args.time_attr`. name: of the study, by default the recipe's. first: points to
        try before all others. patience: seconds to wait for a former owner that is just dying.

        Raises UsageError: R406 another process works on the study, R730 it cannot be read, R731 the name is in use,
        R732 it was begun with another space, R733 a package is missing.
        """
        recipe = resolved.recipe
        self.tune = recipe.tune or Tune()
        self.space = space or Space.of(resolved)
        self._clock = clock
        self._began = clock()
        self._losses_allowed = recipe.scale.max_failures if recipe.scale.max_failures >= 0 else math.inf
        self._stopping = False
        self._events: list[str] = []
        self._measured: list[tuple[float, float | None]] = []
        self._records: dict[int, Record] = {}
        self._lock = lock(Path(folder) / LOCK, timeout=patience)
        try:
            seed = self.tune.seed if self.tune.seed is not None else recipe.seed
            self._scheduler = scheduler_of(self.tune, self.space, budget, seed)
            self._books = Books(self.tune, self.space, name or recipe.name, Path(folder), seed, resume=resume)
            self._log = MetricsLog(locate(log or Path(folder) / LOG), Path(folder))
            self._written = 0
            points = [*self.tune.points_to_evaluate, *first]
            self._limit = self.tune.num_samples
            if self.tune.search_alg == "grid":
                points = [point for point in self.space.grid() if not self.space.invalid(point)]
                self._limit = len(points)
            self._books.queue(points)
            self._rebuild()
        except BaseException:
            self._lock.release()
            raise

    # What lanes ask

    def next(self, lane: str) -> Proposal | None:
        """A trial for a lane with room: first those that nobody trains any more, then a new one; None = nothing left.

        Raises UsageError R721 when a hundred proposals in a row are no valid recipes.
        """
        while self._scheduler.waits_for_all and self._has_room():
            self._ask()
        for record in self._waiting():
            if record.losses > self._losses_allowed:
                reason = f"its lane died {record.losses} times under it"
                self.finish(record.number, "failed", {}, {"reason": reason})
            else:
                return self._hand_out(record, lane)
        return self._hand_out(self._ask(), lane) if self._has_room() else None

    def begun(self, number: int, total_steps: int, **facts: Any) -> None:
        """What a lane knows once the trial is in place."""
        record = self._records[number]
        record.total_steps = total_steps
        record.facts |= facts
        self._books.note(number, "total_steps", total_steps)

    def report(self, number: int, step: int, metrics: Mapping[str, float]) -> Verdict:
        """An evaluation after `step` optimiser steps. One that is known already gets the answer it got then."""
        record = self._records[number]
        known = next((report for report in record.reports if report.step == step), None)
        if known is not None:
            return "stop" if known.verdict == "stop" else "continue"  # it has left then
        scalars = {name: float(value) for name, value in metrics.items()}
        report = Report(step, scalars, "continue")
        record.reports.append(report)
        report.verdict = self._judge(record)
        row = {"trial": number, "event": "report", "trial_step": step, "stop": report.verdict == "stop"}
        self._write(row | {"lane": record.lane} | scalars)
        self._books.report(number, report)
        return report.verdict

    def checkpointed(self, number: int, path: str, step: int) -> None:
        """From where another lane can go on."""
        self._records[number].checkpoint = (path, step)
        self._books.note(number, "checkpoint", [path, step])

    def finish(self, number: int, state: Ended, metrics: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        """The end of a trial; a second one is not counted. metrics: scalars beside those of the last report.

        `pruned` at the full budget is complete; without a finite objective a trial has failed.
        """
        record = self._records[number]
        if record.ended:
            return
        scalars = {name: float(value) for name, value in metrics.items()}
        if record.last:
            record.last.metrics |= scalars
        record.facts |= facts
        if state == "pruned" and record.last and self._scheduler.has_full_budget(self._age(record)):
            state = "complete"
        missing = [metric for metric, _ in self.tune.objectives if record.objective(metric) is None]
        if state != "failed" and missing:
            state = "failed"
            record.facts.setdefault("reason", f"{missing[0]} is missing or not finite")
        if broken := self._broken(record):
            record.facts["infeasible"] = broken
        record.release(state, self._clock())
        self._write({"trial": number, "event": state, "trial_step": record.step, "facts": record.facts} | scalars)
        self._books.close(record)
        self._scheduler.ended(number, self._last_result(record))

    def give_back(self, number: int) -> None:
        """A lane has no room for this trial: another one, or it itself later, goes on from the checkpoint."""
        self._wait(self._records[number])

    def lost(self, lane: str) -> None:
        """The lane has died: what it trained waits for another one."""
        found = [record for record in self._records.values() if record.state == "running" and record.lane == lane]
        for record in found:
            record.losses += 1
            self._wait(record)
        if found:
            numbers = ", ".join(str(record.number) for record in found)
            self.event(f"{lane} died; its trials ({numbers}) went on from their checkpoints")

    def stopping(self) -> bool:
        """Whether lanes are to save their trials, give them back and end."""
        return self._stopping

    def event(self, text: str) -> None:
        """Something that was survived on the way, as a sentence for the report."""
        self._events.append(text)

    # What the driver asks

    def request_stop(self) -> None:
        self._stopping = True

    def measured(self, together: float, alone: float | None) -> None:
        """What a lane measured, in tokens per second of its steps: of its pack, and with one adapter in it."""
        self._measured.append((together, alone))

    def speeds(self) -> tuple[float, float] | None:
        """Tokens per second of all lanes as they ran, and with one trial in each; None where that was not measured."""
        known = [(together, alone) for together, alone in self._measured if alone is not None]
        return (sum(pair[0] for pair in known), sum(pair[1] for pair in known)) if known else None

    def events(self) -> list[str]:
        return list(self._events)

    def limit(self) -> int:
        """Trials that the sweep will have."""
        return self._limit

    def distributions(self) -> dict[str, BaseDistribution]:
        """Recipe path -> Optuna's distribution, as far as it was asked for."""
        return self._books.distributions()

    def rows(self) -> list[TrialRow]:
        names = [metric for metric, _ in self.tune.objectives]
        return [record.row(names, self._clock()) for record in self._records.values()]

    def milestones(self) -> list[float]:
        """Steps at which lanes should evaluate, because a trial may be stopped there."""
        return self._scheduler.milestones() if self._scheduler.time_attr == "step" else []

    def flush(self) -> None:
        """Let others read the log, which goes to a bucket only now and then."""
        self._log.flush()

    def close(self) -> None:
        """Let another process take the study up."""
        self.flush()
        self._lock.release()

    # Within

    def _has_room(self) -> bool:
        return len(self._records) < self._limit and not self._out_of_time()

    def _ask(self) -> Record:
        record = self._books.ask()
        self._add(record)
        return record

    def _add(self, record: Record) -> None:
        self._records[record.number] = record
        self._scheduler.add(record.number, record.values)

    def _waiting(self) -> list[Record]:
        """In the order in which they are handed out. A population keeps together: its youngest trial comes first, and
        of two that are as old the one that had fewer turns: one that clones another must not keep it waiting."""
        found = [record for record in self._records.values() if record.state == "waiting"]
        return sorted(found, key=lambda record: (record.step, record.turns)) if self._scheduler.waits_for_all else found

    def _hand_out(self, record: Record, lane: str) -> Proposal:
        record.hold(lane, self._clock())
        self._scheduler.running(record.number)
        checkpoint = record.checkpoint[0] if record.checkpoint else None
        return Proposal(record.number, record.values, self.space.recipe(record.values), checkpoint, record.exploit)

    def _wait(self, record: Record) -> None:
        record.release("waiting", self._clock())
        self._scheduler.waiting(record.number)

    def _judge(self, record: Record) -> Verdict:
        assert record.last is not None
        value = record.last.metrics.get(self.tune.objectives[0][0])
        if value is not None and not math.isfinite(value):
            return "stop"
        if self._out_of_time() and self._scheduler.waits_for_all:
            return "stop"
        verdict = self._decide(record)
        return "stop" if self._out_of_time() else verdict

    def _decide(self, record: Record) -> Verdict:
        found = self._scheduler.decide(record.number, self._result(record))
        if not isinstance(found, Exploit):
            return found
        donor = self._records[found.donor]
        changed = [f"{path} {shown(value)}" for path, value in found.values.items() if value != donor.values.get(path)]
        self.event(
            f"trial {record.number} went on from trial {donor.number} at step {found.step}"
            + (f" with {', '.join(changed)}" if changed else "")
        )
        record.values, record.exploit = found.values, found
        # Its curve is now that of the weights that it has.
        record.reports[:] = [
            replace(report, verdict="continue") for report in donor.reports if report.step <= found.step
        ]
        told = {"donor": found.donor, "step": found.step, "values": found.values}
        record.facts["taken_over"] = [*record.facts.get("taken_over", []), told]
        return "leave"

    def _result(self, record: Record) -> dict[str, float]:
        """The last report as one of Tune's trials would give it."""
        assert record.last is not None
        ages = {"step": record.last.step, "total_steps": record.total_steps, "training_iteration": len(record.reports)}
        return {**record.last.metrics, **ages}

    def _last_result(self, record: Record) -> dict[str, float] | None:
        """What the rungs learn from a trial that has ended: nothing from a failed one."""
        return self._result(record) if record.last and record.state != "failed" else None

    def _age(self, record: Record) -> float:
        return self._result(record).get(self._scheduler.time_attr, 0)

    def _broken(self, record: Record) -> list[str]:
        """Names of the constraints that the trial breaks."""
        values = {name: record.objective(name) for name in self.tune.constraints}
        return [name for name, value in values.items() if value is not None and value > self.tune.constraints[name]]

    def _out_of_time(self) -> bool:
        return self.tune.time_budget_s is not None and self._clock() - self._began > self.tune.time_budget_s

    def _write(self, row: dict[str, Any]) -> None:
        self._written += 1
        self._log.append({"step": self._written, **row})

    def _rebuild(self) -> None:
        """What a former owner left: trials from Optuna, their reports and ends from the log, in the order of then."""
        for record in self._books.records():
            self._add(record)
        for row in self._log.rows():
            self._written = row["step"]
            if (known := self._records.get(row["trial"])) is not None:
                self._replay(known, row)
        for record in self._records.values():
            self._books.catch_up(record)

    def _replay(self, record: Record, row: Mapping[str, Any]) -> None:
        scalars = {name: math.nan if value is None else value for name, value in row.items() if name not in _NO_SCALARS}
        if row["event"] == "report":
            record.lane = row["lane"]
            record.reports.append(Report(row["trial_step"], scalars, "stop" if row["stop"] else "continue"))
            by_time = row["stop"] and self._scheduler.waits_for_all  # nothing else stops a population
            if math.isfinite(scalars.get(self.tune.objectives[0][0], 0)) and not by_time:
                self._decide(record)
        elif row["event"] in STATES:
            if record.last:
                record.last.metrics |= scalars
            record.state = row["event"]
            record.facts |= row["facts"]
            self._scheduler.ended(record.number, self._last_result(record))
