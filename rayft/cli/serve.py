"""`rayft serve`, and how to look after servers that run."""

from __future__ import annotations

import threading
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rayft.cli.output import Report, execute, facts_table
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, Json, sources_and_overrides

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE | run:NAME ...] [KEY=VALUE]... | status | stop [NAME]",
        help="What to serve: a recipe, runs or folders on one base, and overrides such as serve.port=8080.",
    ),
]


def serve(
    words: Sources = None,
    attach: Annotated[
        str | None, typer.Option("--attach", metavar="URL", help="Of a vLLM that runs already and answers instead.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Come back when the server answers.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Open to other machines without API keys.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a base model and adapters over HTTP: rayft serve run:quickstart, rayft serve status, rayft serve stop"""

    def work() -> Report:
        quiet()
        if words and words[0] == "status":
            return _status()
        if words and words[0] == "stop":
            return _stop(words[1] if len(words) > 1 else None)
        sources, overrides = sources_and_overrides(words)
        if detach:
            return _detached(words or [], sources, overrides, attach, insecure)
        return _in_foreground(sources, overrides, attach, insecure, json)

    execute(work, json, debug)


def _in_foreground(sources: list[str], overrides: list[str], attach: str | None, insecure: bool, json: bool) -> Report:
    from rayft.runtime.stopping import stoppable
    from rayft.serve import deploy, running

    wanted = threading.Event()
    with stoppable(wanted.set), deploy(sources, overrides, attach=attach, insecure=insecure) as server:
        record = running.note(server)
        Console(stderr=json).print(_shown(record))
        while not wanted.wait(0.5):
            pass
        running.forget(record.name)
    return Report({"server": server.name, "stopped": True}, Text("stopped"))


def _detached(words: list[str], sources: list[str], overrides: list[str], attach: str | None, insecure: bool) -> Report:
    from rayft.runtime import session
    from rayft.serve import deploy, running

    if session.existing():  # the cluster keeps the server
        record = running.note(deploy(sources, overrides, attach=attach, insecure=insecure))
    else:
        options = [*(["--insecure"] if insecure else []), *(["--attach", attach] if attach else [])]
        record = running.detach([*words, *options])
    return Report(_facts(record), _shown(record, stop=f"rayft serve stop {record.name}"))


def _status() -> Report:
    from rayft.serve import running

    records = [(record, record.health()) for record in running.records()]
    table = Table("server", "address", "state", "models", box=None, title_justify="left")
    for record, health in records:
        table.add_row(record.name, record.url, health, ", ".join(record.models))
    data = {"servers": [{**_facts(record), "state": health} for record, health in records]}
    return Report(data, table if records else Text("no server was started from here"))


def _stop(name: str | None) -> Report:
    from rayft.serve import running

    stopped = running.stop(name)
    return Report({"stopped": stopped}, Text(f"stopped {', '.join(stopped)}"))


def _facts(record: Any) -> dict[str, Any]:
    return {"name": record.name, "url": record.url, "models": list(record.models), "folder": record.folder}


def _shown(record: Any, stop: str = "Ctrl-C") -> Group:
    model = record.models[-1]
    request = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    facts = {"serving": ", ".join(record.models), "playground": record.url, "API": f"{record.url}/v1", "end it": stop}
    return Group(
        facts_table(facts),
        Text(f"curl {record.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'"),
    )
