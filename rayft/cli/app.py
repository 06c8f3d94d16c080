"""The Typer application that joins the sub-commands."""

from __future__ import annotations

from typing import Annotated

import typer

from rayft import __version__
from rayft.cli import keys, models, recipe, registry, runs
from rayft.cli.chat import chat
from rayft.cli.federate import federate
from rayft.cli.generate import generate
from rayft.cli.serve import serve
from rayft.cli.train import evaluate, submit, train
from rayft.cli.tune import tune

app = typer.Typer(
    name="rayft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tuning on Ray: from recipe to served adapter, nothing is lost and nothing changes silently.",
)
app.command()(train)
app.command()(tune)
app.command()(federate)
app.command()(evaluate)
app.command()(serve)
app.command()(chat)
app.command()(generate)
app.command()(submit)
app.add_typer(recipe.app, name="recipe")
app.add_typer(models.app, name="models")
app.add_typer(runs.app, name="runs")
app.add_typer(keys.app, name="keys")
app.add_typer(registry.app, name="registry")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rayft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script `rayft`."""
    app()
