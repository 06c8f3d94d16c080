"""`rayft chat`: talk to runs in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from rayft.cli.output import Report, execute
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, sources_and_overrides

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE | run:NAME ...] [KEY=VALUE]...",
        help="Who answers, beside the base: runs or folders on one base, and overrides such as model.dtype=fp32.",
    ),
]


def chat(
    words: Sources = None,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.0,
    tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="The same answers again.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    debug: Debug = False,
) -> None:
    """Talk to runs side by side with their base: rayft chat run:quickstart"""

    def work() -> Report:
        quiet()
        from rayft.inference.request import SamplingParams
        from rayft.serve.chat import opened
        from rayft.serve.chat_screen import converse

        sources, overrides = sources_and_overrides(words)
        sampling = SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=seed)
        with opened(sources, overrides, sampling) as talk:
            if system:
                talk.command(f"/system {system}")
            converse(talk, Console())
        return Report({}, Text("", end=""))

    execute(work, debug=debug)
