"""How a command ends: a table or one JSON object on stdout, or an error with its id and an exit code."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rayft.errors import RayftError

STOPPED = 130


@dataclass(frozen=True)
class Report:
    """What a command prints: `data` with --json, `text` for people."""

    data: Mapping[str, Any]
    text: RenderableType
    exit_code: int = 0


def execute(work: Callable[[], Report], as_json: bool = False, debug: bool = False) -> None:
    """Do the work of a command, print its report and leave with its exit code.

    With --json stdout carries exactly one object, {"error": ...} after a failure; everything else goes to stderr.
    A traceback is printed with --debug only.
    """
    try:
        with _stdout_kept_free(as_json):
            report = work()
    except RayftError as error:
        _fail(error.id, error.message, error.hint, error.exit_code, as_json, debug)
    except KeyboardInterrupt:
        hint = "rayft train --resume continues a run from its last checkpoint"
        _fail("R001", "interrupted", hint, STOPPED, as_json, debug)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        _fail("R000", message, "run again with --debug for the traceback", 1, as_json, debug)
    else:
        if as_json:
            print(json.dumps(_without_nan(report.data), default=str, allow_nan=False))
        else:
            # Text is meant to be copied, so it is never wrapped; tables fit the terminal.
            Console().print(report.text, soft_wrap=isinstance(report.text, str | Text))
        if report.exit_code:
            raise typer.Exit(report.exit_code)


def facts_table(facts: Mapping[str, Any], title: str | None = None) -> Table:
    """Two columns: name and value."""
    table = Table(title=title, show_header=False, box=None, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(f"{value:.6g}" if isinstance(value, float) else str(value)))
    return table


def _without_nan(value: Any) -> Any:
    """Plain data that strict JSON can hold: nan and inf become null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(id: str, message: str, hint: str | None, exit_code: int, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if as_json:
        print(json.dumps({"error": {"id": id, "message": message, "hint": hint}}))
    else:
        console = Console(stderr=True, soft_wrap=True)
        console.print(Text(f"{id}: {message}", style="red"))
        if hint:
            console.print(Text(f"  hint: {hint}"))
    raise typer.Exit(exit_code)


@contextlib.contextmanager
def _stdout_kept_free(as_json: bool) -> Iterator[None]:
    """Send what libraries print to stderr while a JSON object is due on stdout."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
