"""`rayft tune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from rayft.cli.modes import New, Overwrite, Resume, mode_of
from rayft.cli.output import Report, execute, facts_table
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, Json, Words, split


def tune(
    words: Words = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    new: New = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show space, mode and plan; start nothing.")] = False,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Start Optuna Dashboard beside the sweep.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search hyperparameters, many adapters at once on one base: rayft tune recipe.yaml tune.num_samples=16"""

    def work() -> Report:
        source, overrides = split(words)
        mode = mode_of(resume=resume, overwrite=overwrite, new=new)
        quiet()
        if dry_run:
            from rayft.tune import dry_run as plan

            planned = plan(source, overrides)
            return Report(planned.to_json(), planned.to_rich())
        from rayft.tune import search

        return _searched(search(source, overrides, mode=mode, dashboard=dashboard))

    execute(work, json, debug)


def _searched(result: Any) -> Report:
    """The end of a sweep: the best trial, where it lies, what to do next."""
    values = dict(result.rows[[row.number for row in result.rows].index(result.best)].values)
    trials = [
        {
            "number": row.number,
            "state": row.state,
            "step": row.step,
            "values": dict(row.values),
            "metrics": dict(row.metrics),
        }
        for row in result.rows
    ]
    data = {
        "path": result.path,
        "state": result.state,
        "best": {"trial": result.best, "kind": result.kind, "values": values, "metrics": dict(result.metrics)},
        "trials": trials,
    }
    shown = {metric: result.metrics[metric] for metric, _ in result.objectives if metric in result.metrics}
    facts = {"run": result.path, "best trial": result.best, **values, **shown, "report": result.report}
    following = f"next: rayft evaluate {result.path}, or rayft train {result.path}/best.yaml"
    return Report(data, Group(facts_table(facts), Text(following)))
