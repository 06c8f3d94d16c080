"""`--resume`, `--overwrite` and `--new`, for every command that makes a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rayft.errors import UsageError

if TYPE_CHECKING:
    from rayft.runs.folder import Mode

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run of this name.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run of this name.")]
New = Annotated[bool, typer.Option("--new", help="Append -2, -3, ... to a name in use.")]


def mode_of(*, resume: bool, overwrite: bool, new: bool) -> Mode:
    """What happens when the run's name is in use. Raises UsageError R111 for two answers at once."""
    options: dict[Mode, bool] = {"resume": resume, "overwrite": overwrite, "new": new}
    given = [name for name, wanted in options.items() if wanted]
    if len(given) > 1:
        raise UsageError("R111", f"--{' and --'.join(given)} exclude each other")
    return given[0] if given else "fail"
