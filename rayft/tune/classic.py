"""Classic mode: each trial is a training run of its own, `rayft.train.fit`, which the study may end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayft.errors import RayftError, RunStopped
from rayft.runs.folder import CHECKPOINTS, RunFolder
from rayft.runs.storage import locate
from rayft.train import fit
from rayft.train.driver import ANSWER
from rayft.tune.owner import Remote
from rayft.tune.record import Proposal


@dataclass(frozen=True)
class ClassicJob:
    """What a classic trial needs, as plain data."""

    run: str
    device: str
    workers: int | tuple[int, int]
    """Training processes per trial; 0 = in the trial's own process."""
    cpus_per_worker: int
    answers: bool
    """Whether an objective needs generated answers."""


class Reporter:
    """Tells the study of a run's evaluations, and the run of the study's decision."""

    def __init__(self, study: Any, number: int) -> None:
        self.study, self.number, self.stopped = study, number, False

    def begun(self, total_steps: int, trainable_parameters: int) -> None:
        self.study.begun(self.number, total_steps, trainable_parameters=trainable_parameters)

    def evaluated(self, row: Mapping[str, Any]) -> bool:
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "time"}
        self.stopped = self.study.report(self.number, scalars.pop("step"), scalars) == "stop"
        return self.stopped or self.study.stopping()


def ray_trial(config: dict[str, Any], job: ClassicJob, study: Any) -> None:
    """A trial of Ray Tune that is one training run. Started again after a death, it goes on with its own trial."""
    owner = Remote(study)
    name = f"trial-{config['lane']}"
    owner.lost(name)
    os.environ.update(owner.environment())
    run_next(job, name, owner)


def run_next(job: ClassicJob, name: str, study: Any) -> bool:
    """Train the study's next trial; False when there is none."""
    proposal: Proposal | None = None if study.stopping() else study.next(name)
    if proposal is None:
        return False
    number = proposal.number
    reporter = Reporter(study, number)
    try:
        _train(job, proposal, reporter)
    except RunStopped as stopped:
        if not reporter.stopped:  # the sweep ends, and the run goes on with it later
            study.give_back(number)
            return False
        _export(job, number)
        study.finish(number, "pruned", {}, {"stopped": stopped.message})
    except RayftError as error:
        study.finish(number, "failed", {}, {"reason": f"{error.id}: {error.message}"[:500]})
    else:
        study.finish(number, "complete", {}, _facts(job, number))
    (_folder(job, number).location / CHECKPOINTS).remove()
    return True


def _train(job: ClassicJob, proposal: Proposal, reporter: Reporter) -> None:
    plain = proposal.recipe.model_dump(mode="json")
    plain |= {"name": str(proposal.number), "storage": f"{job.run}/trials", "tune": None}
    plain["scale"] |= {"workers": job.workers, "cpus_per_worker": job.cpus_per_worker, "device": job.device}
    plain["train"] |= {"report_to": []}
    there = (locate(job.run) / "trials" / str(proposal.number) / "run.json").is_file()
    answer = ANSWER if job.answers else None
    fit(plain, mode="resume" if there else "fail", answer=answer, quiet=True, watcher=reporter)


def _export(job: ClassicJob, number: int) -> None:
    """The adapter or model of a run that was stopped, from its last checkpoint."""
    from rayft.train.finish import export

    folder = _folder(job, number)
    steps = folder.checkpoints()
    if steps:
        kind = export(folder, max(steps), folder.recipe().model.dtype)
        folder.note(kind=kind)


def _facts(job: ClassicJob, number: int) -> dict[str, Any]:
    from rayft.train.worker import peak_memory

    rows = _folder(job, number).metrics()
    rates = [row["tokens_per_second"] for row in rows[1:] if row.get("tokens_per_second")]
    facts = {"tokens_per_second": round(sum(rates) / len(rates), 2)} if rates else {}
    if job.workers == 0:
        facts["peak_memory_gb"] = round(peak_memory(job.device) / 1e9, 3)
    return facts


def _folder(job: ClassicJob, number: int) -> RunFolder:
    return RunFolder.open(locate(job.run) / "trials" / str(number))
