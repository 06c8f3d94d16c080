"""Attempt after attempt until a run has ended: what is tried again, what is not, and with which change."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from rayft.errors import RunFailed, UsageError
from rayft.runs.folder import RunFolder
from rayft.train.launch import Died, Launcher
from rayft.train.worker import Job

MAX_ROLLBACKS = 3
CARRIED = ("attempt", "micro_batch_size", "diverged", "learning_rate_scale")
"""Fields of a job that stay with the run, in `run.json`."""


@dataclass
class Failures:
    """What has gone wrong so far."""

    budget: int
    """Attempts that may still fail; -1 = any number."""
    rollbacks: int = 0
    last_error: tuple[int, str] | None = None

    def spend(self, reason: str, detail: str) -> None:
        """Raise RunFailed R604 when the budget is used up."""
        if self.budget == 0:
            raise RunFailed(
                "R604", f"{reason}; scale.max_failures attempts are used up\n{detail}", "fix it and --resume"
            )
        self.budget -= 1


def run_to_end(
    launcher: Launcher, folder: RunFolder, job: Job, max_failures: int, on_divergence: str
) -> dict[str, Any]:
    """Launch attempts until one ends; returns the worker's facts.

    Out of memory: half the micro-batch, the same losses. Divergence: a rollback where the recipe says so. A dead worker
    or an error: again from the latest checkpoint, `max_failures` times; but an error that repeats at the same step
    would repeat for ever, and a mistake of the user is not tried twice.
    Raises UsageError or RunFailed (R601 out of memory, R602 diverged, R603 repeated error, R604 too many failures).
    """
    failures = Failures(max_failures)
    while True:
        job = replace(job, resume=tuple(folder.checkpoints().values()))
        # A later driver that resumes the run goes on with the same halved batch and rate.
        folder.note(attempt={name: getattr(job, name) for name in CARRIED})
        seen = len(launcher.recording.ask("events"))
        try:
            outcome = launcher.launch(job)
        except Exception as error:  # an attempt in this process raises what it has told the recorder
            outcome = Died(str(error))
        if not isinstance(outcome, Died):
            return outcome
        told = [event for event in launcher.recording.ask("events")[seen:] if event["kind"] == "failure"]
        job = _next(job, told, outcome, failures, on_divergence)


def _next(job: Job, told: list[dict[str, Any]], died: Died, failures: Failures, on_divergence: str) -> Job:
    """The job of the next attempt; raises when there is none."""
    following = replace(job, attempt=job.attempt + 1)
    failure = min(told, key=lambda event: _ORDER.index(event["cause"])) if told else None
    if failure is not None and failure["cause"] == "refused":
        kind = UsageError if failure["exit_code"] == 2 else RunFailed
        raise kind(failure["id"], failure["detail"], failure["hint"])
    if (failure is not None and failure["cause"] == "oom") or (failure is None and died.out_of_memory):
        return replace(following, micro_batch_size=_halved(job, failure), reason="out of memory")
    if failure is not None and failure["cause"] == "diverged":
        _refuse_divergence(failure, failures, on_divergence)
        return replace(
            following,
            diverged=(failure["since"], job.attempt),
            learning_rate_scale=job.learning_rate_scale / 2,
            reason="divergence: half the learning rate",
        )
    if failure is not None and failure["cause"] == "error":
        signature = (failure["step"], re.sub(r"0x[0-9a-f]+|\d+", "#", failure["detail"]))
        if signature == failures.last_error:
            raise RunFailed(
                "R603",
                f"the same error twice at step {failure['step']}: {failure['detail']}\n{failure['traceback']}",
                "it would repeat for ever; fix it and --resume",
            )
        failures.last_error = signature
        failures.spend(f"step {failure['step']}: {failure['detail']}", failure["traceback"])
        return replace(following, reason=failure["detail"].splitlines()[0][:200])
    failures.spend("a worker died", died.detail[-2000:])
    return replace(following, reason="a worker died")


_ORDER = ("refused", "oom", "diverged", "error", "lost_peer")
"""When several ranks fail, the first of these is the cause; the others are its echo."""


def _halved(job: Job, failure: dict[str, Any] | None) -> int:
    if job.micro_batch_size > 1:
        return job.micro_batch_size // 2
    peak = f" The measured peak was {failure['peak_memory'] / 1e9:.1f} GB." if failure else ""
    detail = f" ({failure['detail']})" if failure else ""
    raise RunFailed(
        "R601",
        f"out of memory with one example per forward pass{detail}.{peak}",
        "lower data.max_length; set train.gradient_checkpointing=true; or shrink the weights with "
        "model.quantization=nf4 or spread them with scale.strategy=zero3",
    )


def _refuse_divergence(failure: dict[str, Any], failures: Failures, on_divergence: str) -> None:
    if on_divergence == "rollback" and failures.rollbacks < MAX_ROLLBACKS:
        failures.rollbacks += 1
        return
    tried = f" after {failures.rollbacks} rollbacks" if failures.rollbacks else ""
    raise RunFailed(
        "R602",
        f"the run diverged at step {failure['step']}{tried}: {failure['detail']}",
        "lower train.learning_rate, raise train.warmup_steps, or set train.on_divergence=rollback",
    )
