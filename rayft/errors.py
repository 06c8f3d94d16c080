"""Errors a user can meet. Each has a stable id (documented in docs/errors.md) and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the user can fix it, 3 ``--fail-if`` was true, 130 stopped and resumable.
"""

from __future__ import annotations


class RayftError(Exception):
    """Base of every error that rayft raises on purpose.

    ``id`` is stable across releases and names a section of docs/errors.md. ``hint`` says what to do next.
    """

    exit_code = 1

    def __init__(self, id: str, message: str, hint: str | None = None) -> None:
        super().__init__(id, message, hint)
        self.id = id
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.id}: {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class UsageError(RayftError):
    """Something the user can fix before anything starts: recipe, data, run name, cluster size."""

    exit_code = 2


class RunFailed(RayftError):
    """The run started and could not end."""

    exit_code = 1


class RunStopped(RayftError):
    """The run was stopped on request; a checkpoint was saved and ``--resume`` continues it."""

    exit_code = 130
