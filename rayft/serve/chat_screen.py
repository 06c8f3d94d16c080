"""A chat on a terminal, answers side by side as they come; or line by line, for pipes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rayft.serve.chat import Answer

if TYPE_CHECKING:
    from rayft.serve.chat import Chat


def converse(chat: Chat, console: Console) -> None:
    """Until the end of the input, or `/quit`. Ctrl-C ends an answer; where none is being given, the chat."""
    names = ", ".join(side.name for side in chat.sides)
    if console.is_terminal:
        console.print(Text(f"{names}\n/help says what there is; Ctrl-D leaves", style="dim"))
    with asyncio.Runner() as runner:  # one event loop for all: what a replica waits for belongs to it
        for line in _lines(console):
            if not line.strip():
                continue
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                console.print(Text(chat.command(line), style="dim"))
                continue
            try:
                runner.run(_answer(chat, line, console))
            except KeyboardInterrupt:
                console.print(Text("stopped; the question is forgotten", style="dim"))


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            yield console.input(Text("you  ", style="bold") if console.is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            return


async def _answer(chat: Chat, question: str, console: Console) -> None:
    answers: Mapping[str, Answer] = {}
    if not console.is_terminal:
        async for now in chat.ask(question):
            answers = now
        for name, answer in answers.items():
            console.print(Text(f"{name}: {answer.text if answer.error is None else answer.error}"), soft_wrap=True)
        return
    with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        async for answers in chat.ask(question):
            live.update(_side_by_side(answers))
        live.update(_side_by_side(answers))


def _side_by_side(answers: Mapping[str, Answer]) -> Table:
    table = Table.grid(expand=True)
    for _ in answers:
        table.add_column(ratio=1)
    table.add_row(*(_panel(name, answer) for name, answer in answers.items()))
    return table


def _panel(name: str, answer: Answer) -> Panel:
    if answer.error is not None:
        return Panel(Text(answer.error, style="red"), title=Text(name), border_style="red")
    speed = f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.0f}/s" if answer.seconds else "..."
    if answer.finish == "length":
        speed += ", cut off"
    return Panel(Text(answer.text.strip()), title=Text(name), subtitle=Text(speed), border_style="dim")
