"""`rayft keys add|list|revoke`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from rayft.cli.output import Report, execute
from rayft.cli.words import Debug, Json

app = typer.Typer(no_args_is_help=True, help="API keys of a server (`serve.api_keys`).")

File = Annotated[str, typer.Option("--file", "-f", help="File of the keys; it holds hashes, never the keys.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]
DEFAULT = "keys.json"


@app.command()
def add(
    name: Name,
    file: File = DEFAULT,
    admin: Annotated[bool, typer.Option("--admin", help="May also load, unload and promote adapters.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Whose share its requests count to; NAME by default.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A name that it may use, `*` allowed; several times. All by default.")
    ] = None,
    requests_per_second: Annotated[float | None, typer.Option(help="Most requests per second.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens, prompts and answers.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Most requests at a time.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a key and print it. Nobody can look it up later; servers that use the file take it at once."""

    def work() -> Report:
        from rayft.serve import keys

        key = keys.add(
            file,
            name,
            admin=admin,
            tenant=tenant,
            adapters=adapter,
            requests_per_second=requests_per_second,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
        )
        return Report({"name": name, "key": key, "file": file}, Text(key))

    execute(work, json, debug)


@app.command("list")
def list_keys(file: File = DEFAULT, json: Json = False, debug: Debug = False) -> None:
    """Who has a key, and what it allows."""

    def work() -> Report:
        from pathlib import Path

        from rayft.serve import keys

        known = keys.read(Path(file))
        table = Table(
            "name", "admin", "tenant", "adapters", "requests/s", "tokens/min", "at a time", "created", box=None
        )
        for key in known:
            table.add_row(
                key.name,
                "yes" if key.admin else "",
                key.owner,
                "all" if key.adapters is None else ", ".join(key.adapters),
                *("" if limit is None else f"{limit:g}" for limit in _limits(key)),
                key.created,
            )
        data = {"keys": [key.model_dump(exclude={"hash"}) for key in known]}
        return Report(data, table if known else Text("no keys yet"))

    execute(work, json, debug)


@app.command()
def revoke(name: Name, file: File = DEFAULT, json: Json = False, debug: Debug = False) -> None:
    """Take a key away. Servers refuse it from the next request on."""

    def work() -> Report:
        from rayft.serve import keys

        keys.revoke(file, name)
        return Report({"revoked": name}, Text(f"revoked {name}"))

    execute(work, json, debug)


def _limits(key: object) -> list[float | None]:
    return [getattr(key, name) for name in ("requests_per_second", "tokens_per_minute", "concurrency")]
