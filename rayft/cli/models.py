"""`rayft models list|pull`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from rayft.cli.output import Report, execute, facts_table
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, Json

app = typer.Typer(no_args_is_help=True, help="Base models that have a short name, and fetching of any base model.")


@app.command("list")
def list_models(json: Json = False, debug: Debug = False) -> None:
    """List the short names with licence, download size and whether they are on this machine."""

    def work() -> Report:
        from rayft.models.hub import catalogue

        table = Table("name", "licence", "download", "source", "here", box=None)
        rows = []
        for alias in catalogue():
            here = alias.folder.exists()
            rows.append(
                {
                    "name": alias.name,
                    "licence": alias.licence,
                    "bytes": alias.size,
                    "source": alias.source,
                    "here": here,
                }
            )
            table.add_row(
                alias.name, alias.licence, f"{alias.size / 1e6:.0f} MB", alias.source, "yes" if here else "no"
            )
        return Report({"models": rows}, table)

    execute(work, json, debug)


@app.command()
def pull(
    base: Annotated[str, typer.Argument(help="Short name, Hub id, bucket URI or .gguf file.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring a base model onto this machine and print its folder."""

    def work() -> Report:
        quiet()
        from rayft.models.hub import catalogue, fetch

        licence = next((alias.licence for alias in catalogue() if alias.name == base), None)
        facts = {"base": base, "folder": fetch(base, revision), "licence": licence or "see the model's own card"}
        return Report(facts, facts_table(facts))

    execute(work, json, debug)
