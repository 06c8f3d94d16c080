"""The words after a command: at most one recipe, then `key=value` overrides. And the options that every verb has."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from rayft.errors import UsageError

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe and overrides such as train.learning_rate=1e-4."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def sources_and_overrides(words: list[str] | None) -> tuple[list[str], list[str]]:
    """(recipes, runs and folders; overrides)."""
    overrides = [word for word in words or [] if _OVERRIDE.match(word)]
    return [word for word in words or [] if not _OVERRIDE.match(word)], overrides


def split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """(recipe or None, overrides). Raises UsageError R110 when there are two recipes."""
    sources, overrides = sources_and_overrides(words)
    if len(sources) > 1:
        raise UsageError(
            "R110", f"one recipe at a time, given: {', '.join(sources)}", "an override is key=value, without spaces"
        )
    return (sources[0] if sources else None), overrides
