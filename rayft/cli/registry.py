"""`rayft registry list|show|register|promote|rollback|weights|remove`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rayft.cli.output import Report, execute, facts_table
from rayft.cli.words import Debug, Json
from rayft.errors import UsageError

if TYPE_CHECKING:
    from rayft.runs.registry import Alias, Event, Registry, Version

app = typer.Typer(no_args_is_help=True, help="Names that a server answers to, their versions, and who gets requests.")

Folder = Annotated[
    str | None,
    typer.Option("--registry", metavar="FOLDER", help="The registry; by default the folder `registry` in the storage."),
]
Storage = Annotated[str | None, typer.Option(help="Folder of the runs; by default $RAYFT_STORAGE, then ./runs.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What requests give as `model`.")]
Number = Annotated[int, typer.Argument(metavar="VERSION", help="Number of a version, as `show` lists them.")]
_SHOWN_EVENTS = 10


@app.command("list")
def list_names(registry: Folder = None, storage: Storage = None, json: Json = False, debug: Debug = False) -> None:
    """List the names, with the versions that answer."""

    def work() -> Report:
        opened = _open(registry, storage)
        aliases = sorted(opened.aliases().values(), key=lambda alias: alias.name)
        table = Table("name", "answers", "versions", "pinned", "changed", box=None)
        for alias in aliases:
            pinned, changed = "yes" if alias.pinned else "", _day(alias.history[-1].time if alias.history else None)
            table.add_row(alias.name, _shares(alias.weights), str(len(alias.versions)), pinned, changed)
        nothing = Text(f"no adapters in {opened.folder} yet: rayft registry register NAME run:RUN")
        return Report({"adapters": [_plain(alias) for alias in aliases]}, table if aliases else nothing)

    execute(work, json, debug)


@app.command()
def show(
    name: Name, registry: Folder = None, storage: Storage = None, json: Json = False, debug: Debug = False
) -> None:
    """Show the versions of a name and what was last done to it."""

    def work() -> Report:
        alias = _open(registry, storage).alias(name)
        facts: dict[str, object] = {"name": alias.name, "answers": _shares(alias.weights)}
        if alias.pinned:
            facts["pinned"] = "yes"
        if alias.strength != 1:
            facts["strength"] = alias.strength
        tables = facts_table(facts), Text(), _versions(alias.versions), Text(), _events(alias.history)
        return Report(_plain(alias), Group(*tables))

    execute(work, json, debug)


@app.command()
def register(
    name: Name,
    source: Annotated[str, typer.Argument(help="run:RUN[@best|step-N|...], a folder or a bucket with an adapter.")],
    promote: Annotated[bool, typer.Option("--promote", help="Let it answer every request at once.")] = False,
    stage: Annotated[Literal["none", "staging", "archived"], typer.Option(help="A mark for people.")] = "none",
    note: Annotated[str, typer.Option(help="A line about this version.")] = "",
    registry: Folder = None,
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy an adapter into the registry as the next version of a name."""

    def work() -> Report:
        opened = _open(registry, storage)
        version = opened.register(name, source, storage=storage, stage="production" if promote else stage, note=note)
        said = f"{name} has version {version.number} (rank {version.rank}, {_bytes(version.size)})"
        next_step = f"rayft registry promote {name} {version.number} lets it answer"
        then = "it answers every request" if promote else next_step
        return Report({**_plain(opened.alias(name)), "registered": version.number}, Text(f"{said}; {then}"))

    execute(work, json, debug)


@app.command()
def promote(
    name: Name,
    version: Number,
    registry: Folder = None,
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Put a version into production: it gets every request, and the one before it is archived."""
    execute(lambda: _changed(_open(registry, storage).promote(name, version)), json, debug)


@app.command()
def rollback(
    name: Name, registry: Folder = None, storage: Storage = None, json: Json = False, debug: Debug = False
) -> None:
    """Take back the last promotion or change of weights."""
    execute(lambda: _changed(_open(registry, storage).rollback(name)), json, debug)


@app.command()
def weights(
    name: Name,
    shares: Annotated[list[str], typer.Argument(metavar="VERSION=WEIGHT...", help="Such as 1=90 2=10.")],
    registry: Folder = None,
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Split the requests among versions; one that is not named gets none."""
    execute(lambda: _changed(_open(registry, storage).weigh(name, _weights(shares))), json, debug)


@app.command()
def remove(
    name: Name,
    version: Annotated[int | None, typer.Argument(metavar="[VERSION]", help="Only this version.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    registry: Folder = None,
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Forget a name, or one version that gets no requests, with the registry's copy of it."""
    what = name if version is None else f"version {version} of {name}"
    if not yes:
        typer.confirm(f"Remove {what} for good?", abort=True, err=True)

    def work() -> Report:
        _open(registry, storage).remove(name, version)
        return Report({"removed": name, "version": version}, Text(f"removed {what}"))

    execute(work, json, debug)


def _open(registry: str | None, storage: str | None) -> Registry:
    import getpass
    import os

    from rayft.runs.registry import Registry, default_folder

    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        who = None
    return Registry(default_folder(storage or os.environ.get("RAYFT_STORAGE") or "runs", registry), who)


def _changed(alias: Alias) -> Report:
    return Report(_plain(alias), Text(f"{alias.name}: {_shares(alias.weights)}"))


def _weights(shares: list[str]) -> dict[int, float]:
    try:
        return {int(number): float(weight) for number, _, weight in (share.partition("=") for share in shares)}
    except ValueError as problem:
        raise UsageError("R427", f"{' '.join(shares)!r} are not weights", "such as 1=90 2=10") from problem


def _plain(alias: Alias) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(alias), "production": alias.production and alias.production.number}


def _shares(weights: Mapping[int, float]) -> str:
    """`version 3`, or `version 4 10%, version 3 90%`: the newest first."""
    if len(weights) == 1:
        return f"version {next(iter(weights))}"
    shares = [f"version {number} {100 * weights[number]:.3g}%" for number in sorted(weights, reverse=True)]
    return ", ".join(shares) or "nothing"


def _versions(versions: tuple[Version, ...]) -> Table:
    table = Table("version", "stage", "source", "step", "rank", "size", "created", "content", "note", box=None)
    for version in reversed(versions):
        step = "" if version.step is None else str(version.step)
        facts = (version.source, step, str(version.rank), _bytes(version.size), _day(version.created))
        table.add_row(str(version.number), version.stage, *facts, version.hash[:12], version.note)
    return table


def _events(events: tuple[Event, ...]) -> Table:
    table = Table("when", "who", "what", "answered", box=None)
    for event in reversed(events[-_SHOWN_EVENTS:]):
        what = event.what if event.version is None else f"{event.what} {event.version}"
        table.add_row(_day(event.time), event.who or "", what, _shares(event.after.weights))
    return table


def _day(seconds: float | None) -> str:
    from datetime import datetime

    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
