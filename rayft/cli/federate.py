"""`rayft federate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from rayft.cli.modes import New, Overwrite, Resume, mode_of
from rayft.cli.output import Report, execute, facts_table
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, Json, Words, split

SHOWN = ("loss", "validation_loss", "federated_loss", "federated_worst_decile", "gap", "epsilon", "mb_total")


def federate(
    words: Words = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    new: New = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show recipe, clients, messages, memory and epsilon; start nothing.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train one adapter on many clients' data, round by round: rayft federate recipe.yaml federate.rounds=20"""

    def work() -> Report:
        source, overrides = split(words)
        mode = mode_of(resume=resume, overwrite=overwrite, new=new)
        quiet()
        if dry_run:
            from rayft.federate import dry_run as plan

            planned = plan(source, overrides)
            return Report(planned.to_json(), planned.to_rich())
        from rayft.federate import run

        return _federated(run(source, overrides, mode=mode))

    execute(work, json, debug)


def _federated(result: Any) -> Report:
    """The end of a federation: the best round, what it cost, where it lies."""
    data = {
        "path": result.path,
        "state": result.state,
        "rounds": result.rounds,
        "ended": result.ended,
        "best": {"round": result.best, "metrics": dict(result.metrics)},
    }
    shown = {name: result.metrics[name] for name in SHOWN if result.metrics.get(name) is not None}
    facts = {"run": result.path, "rounds": result.rounds, "best round": result.best, **shown, "report": result.report}
    return Report(data, Group(facts_table(facts), Text(f"next: rayft evaluate {result.path}")))
