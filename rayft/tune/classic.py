"""Classic mode: each trial is a training run of its own, `rayft.train.fit`, which the study may end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayft import config
from rayft.errors import RayftError, RunFailed, RunStopped
from rayft.runs.changes import changes
from rayft.runs.folder import CHECKPOINTS, Mode, RunFolder
from rayft.runs.storage import locate
from rayft.train import fit
from rayft.train.driver import ANSWER, Clone
from rayft.tune.owner import Remote
from rayft.tune.record import Exploit, Proposal, Verdict

SAVING_SECONDS = 300
"""How long a run may take to save a checkpoint that another one waits for."""


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
    interval: int | None = None
    """pbt: runs evaluate and save after so many steps, and keep what they save until the sweep ends."""


class Reporter:
    """Tells the study of a run's evaluations, and the run of the study's decision."""

    def __init__(self, study: Any, number: int) -> None:
        self.study, self.number = study, number
        self.verdict: Verdict = "continue"

    def begun(self, total_steps: int, trainable_parameters: int) -> None:
        self.study.begun(self.number, total_steps, trainable_parameters=trainable_parameters)

    def evaluated(self, row: Mapping[str, Any]) -> bool:
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "time"}
        self.verdict = self.study.report(self.number, scalars.pop("step"), scalars)
        return self.verdict != "continue" or self.study.stopping()


def ray_trial(config: dict[str, Any], job: ClassicJob, study: Any) -> None:
    """A trial of Ray Tune that is one training run. Started again after a death, it goes on with its own trial."""
    owner = Remote(study)
    name = f"trial-{config['lane']}"
    owner.lost(name)
    os.environ.update(owner.environment())
    while run_next(job, name, owner) and job.interval is not None:
        pass  # of a population each trial of Ray Tune trains whichever run comes next


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
        if reporter.verdict != "stop":  # the run goes on later: after another one, or when the sweep is resumed
            study.give_back(number)
            return reporter.verdict == "leave"
        _export(job, number)
        study.finish(number, "pruned", {}, {"stopped": stopped.message})
    except RayftError as error:
        study.finish(number, "failed", {}, {"reason": f"{error.id}: {error.message}"[:500]})
    else:
        if reporter.verdict == "leave":  # the run had come to its end before it heard
            study.give_back(number)
            return True
        _tell_end(job, number, reporter)
        study.finish(number, "complete", {}, _facts(job, number))
    if job.interval is None:
        (_folder(job, number).location / CHECKPOINTS).remove()
    return True


def _train(job: ClassicJob, proposal: Proposal, reporter: Reporter) -> None:
    plain = proposal.recipe.model_dump(mode="json")
    plain |= {"name": str(proposal.number), "storage": f"{job.run}/trials", "tune": None}
    plain["scale"] |= {"workers": job.workers, "cpus_per_worker": job.cpus_per_worker, "device": job.device}
    plain["train"] |= {"report_to": []}
    if job.interval is not None:
        plain["train"] |= {"eval_steps": job.interval, "save_steps": job.interval, "save_total_limit": None}
    there = (locate(job.run) / "trials" / str(proposal.number) / "run.json").is_file()
    mode: Mode = "resume" if there else "fail"
    clone = None
    if (exploit := proposal.exploit) is not None:
        parent = f"{job.run}/trials/{exploit.donor}@step-{exploit.step}"
        if not there or not _goes_on(_folder(job, proposal.number), parent, plain):
            mode, clone = "overwrite", Clone(_saved(job, exploit), parent)
    fit(plain, mode=mode, answer=ANSWER if job.answers else None, quiet=True, watcher=reporter, clone=clone)


def _goes_on(run: RunFolder, parent: str, plain: Mapping[str, Any]) -> bool:
    """Whether this is the clone already, and not what the trial was before."""
    changed = changes(run.recipe(), config.load(plain).recipe)
    return run.record.parent == parent and all(change.free for change in changed)


def _saved(job: ClassicJob, exploit: Exploit) -> str:
    """The donor's checkpoint of that step, which it may be writing just now."""
    deadline = time.monotonic() + SAVING_SECONDS
    while (found := _folder(job, exploit.donor).checkpoints().get(exploit.step)) is None:
        if time.monotonic() > deadline:
            raise RunFailed("R604", f"trial {exploit.donor} has saved no checkpoint at step {exploit.step}")
        time.sleep(0.2)
    return found


def _tell_end(job: ClassicJob, number: int, reporter: Reporter) -> None:
    """The last evaluation of a run that came to its end while it was asked to leave, and so did not tell of it."""
    evaluated = [row for row in _folder(job, number).metrics() if row.get("validation_loss") is not None]
    if evaluated:
        reporter.evaluated(evaluated[-1])


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
