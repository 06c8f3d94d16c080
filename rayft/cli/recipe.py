"""`rayft recipe show|schema|validate`."""

from __future__ import annotations

import typer
from rich.syntax import Syntax
from rich.text import Text

from rayft.cli.output import Report, execute
from rayft.cli.words import Debug, Json, Words, split

app = typer.Typer(no_args_is_help=True, help="Look at a recipe without starting anything.")


@app.command()
def show(words: Words = None, json: Json = False, debug: Debug = False) -> None:
    """Print the resolved recipe; a comment says whether user, default or derivation decided each value."""

    def work() -> Report:
        from rayft.config import load

        resolved = load(*split(words))
        data = {"recipe": resolved.recipe.model_dump(mode="json"), "origin": resolved.origin}
        return Report(data, Syntax("", "yaml", background_color="default").highlight(resolved.to_yaml()))

    execute(work, json, debug)


@app.command()
def validate(words: Words = None, json: Json = False, debug: Debug = False) -> None:
    """Check a recipe as a whole; exit code 2 and every problem when it is not valid."""

    def work() -> Report:
        from rayft.config import load
        from rayft.config.compatibility import unverified

        notes = unverified(load(*split(words)).recipe)
        lines = ["the recipe is valid", *(f"unverified on GPU: {note}" for note in notes)]
        return Report({"valid": True, "unverified": notes}, Text("\n".join(lines)))

    execute(work, json, debug)


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema for editors: rayft recipe schema > recipe.schema.json"""

    def work() -> Report:
        from rayft.config.docs import schema as recipe_schema

        return Report(recipe_schema(), "")

    execute(work, True, debug)
