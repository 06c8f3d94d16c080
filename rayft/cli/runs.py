"""`rayft runs list|show|rm`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from rayft.cli.output import Report, execute, facts_table
from rayft.cli.words import Debug, Json

app = typer.Typer(no_args_is_help=True, help="Look at the runs of a storage, and remove them.")

Storage = Annotated[
    str | None, typer.Option(help="Folder or bucket of the runs; $RAYFT_STORAGE and ./runs are searched too.")
]
Name = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, with or without `run:`.")]


@app.command("list")
def list_runs(storage: Storage = None, json: Json = False, debug: Debug = False) -> None:
    """List the runs, newest first."""

    def work() -> Report:
        from rayft.runs.listing import list_runs as runs_of

        table = Table("name", "verb", "state", "step", "created", "path", box=None)
        runs = runs_of(storage)
        for run in runs:
            step = "" if run.last_step is None else str(run.last_step)
            table.add_row(run.name, run.verb, run.state, step, run.created, run.path)
        return Report({"runs": [asdict(run) for run in runs]}, table if runs else Text("no runs yet"))

    execute(work, json, debug)


@app.command()
def show(name: Name, storage: Storage = None, json: Json = False, debug: Debug = False) -> None:
    """Show what a run is, how it stands and where its checkpoints lie."""

    def work() -> Report:
        from rayft.runs.listing import show_run

        run = show_run(name, storage)
        return Report(run, facts_table(run))

    execute(work, json, debug)


@app.command()
def rm(
    name: Name,
    storage: Storage = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete a run with its checkpoints and its adapter."""
    if not yes:
        typer.confirm(f"Delete the run {name} for good?", abort=True, err=True)

    def work() -> Report:
        from rayft.runs.listing import remove_run

        path = remove_run(name, storage)
        return Report({"removed": path}, Text(f"removed {path}"))

    execute(work, json, debug)
