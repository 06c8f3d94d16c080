"""`rayft train`, `rayft evaluate`, `rayft submit`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from rayft.cli.modes import New, Overwrite, Resume, mode_of
from rayft.cli.output import STOPPED, Report, execute, facts_table
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, Json, Words, split

HIDDEN = (
    *("time", "seconds", "learning_rate", "padding_tokens", "seconds_per_step", "supervised_tokens_per_second"),
    *("padding_share", "data_share", "report_share"),
)
"""Scalars that metrics.jsonl, --json and the report have, but that nobody needs at the end of a run."""


def train(
    words: Words = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    new: New = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show recipe, plan and memory; start nothing.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Three steps, save, reload and generate.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model: rayft train model.base=Qwen/Qwen3-0.6B data.train=my.jsonl"""

    def work() -> Report:
        source, overrides = split(words)
        mode = mode_of(resume=resume, overwrite=overwrite, new=new)
        quiet()
        if dry_run:
            from rayft.train import dry_run as plan

            planned = plan(source, overrides)
            return Report(planned.to_json(), planned.to_rich())
        if smoke:
            from rayft.train.smoke import smoke as try_out

            facts = try_out(source, overrides)
            return Report(facts, facts_table(facts, "trained, saved, reloaded and generated"))
        from rayft.train import fit

        return _trained(fit(source, overrides, mode=mode))

    execute(work, json, debug)


def evaluate(words: Words = None, json: Json = False, debug: Debug = False) -> None:
    """Score a run, a folder or a recipe's base model on its validation data: rayft evaluate run:quickstart"""

    def work() -> Report:
        source, overrides = split(words)
        quiet()
        from rayft.evaluate import score

        result = score(source, overrides)
        return Report(result.to_json(), result.to_rich())

    execute(work, json, debug)


def submit(
    words: Words = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    new: New = False,
    address: Annotated[
        str | None,
        typer.Option(help="Dashboard of the cluster, such as http://head:8265; else $RAY_API_SERVER_ADDRESS."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print the job's log until it ends.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train on a Ray cluster as a job: rayft submit recipe.yaml --address http://head:8265"""

    def work() -> Report:
        source, overrides = split(words)
        mode = mode_of(resume=resume, overwrite=overwrite, new=new)
        quiet()
        from rayft.runtime.jobs import submit as submit_job

        job = submit_job(source, overrides, address=address, follow=follow, mode=mode)
        return Report(job, facts_table(job))

    execute(work, json, debug)


def _trained(result: Any) -> Report:
    """The end of a training run: where it lies, its last numbers, what to do next."""
    data = {"path": str(result.path), "kind": result.kind, "state": result.state, "metrics": dict(result.metrics)}
    shown = {
        name: value
        for name, value in result.metrics.items()
        if name not in HIDDEN and not name.startswith("grad_norm") and not isinstance(value, list | dict)
    }
    facts = {"run": data["path"], "state": result.state, "trained": result.kind, **shown}
    stopped = result.state == "stopped"
    following = "rayft train --resume with the same recipe goes on" if stopped else f"rayft evaluate {result.path}"
    return Report(data, Group(facts_table(facts), Text(f"next: {following}")), STOPPED if stopped else 0)
