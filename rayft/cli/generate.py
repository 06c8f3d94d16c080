"""`rayft generate`: answers to a file of prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from rayft.cli.output import Report, execute, facts_table
from rayft.cli.quiet import quiet
from rayft.cli.words import Debug, Json, sources_and_overrides

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE | run:NAME ...] [KEY=VALUE]...",
        help="Who answers: runs or folders on one base, and overrides such as scale.workers=8.",
    ),
]


def generate(
    input: Annotated[str, typer.Option("--input", help="JSON lines with `prompt` or `messages`.")],
    output: Annotated[str, typer.Option("--output", help="JSON lines with `text`, in the order of the input.")],
    words: Sources = None,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.0,
    tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="The same answers again.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a file of prompts: rayft generate run:quickstart --input prompts.jsonl --output answers.jsonl"""

    def work() -> Report:
        quiet()
        from rayft.inference.request import SamplingParams
        from rayft.serve.offline import generate as answer

        sources, overrides = sources_and_overrides(words)
        defaults = SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=seed)
        result = answer(sources, overrides, input=input, output=output, defaults=defaults)
        facts = result.to_json()
        facts["tokens_per_second"] = round(result.completion_tokens / max(result.seconds, 1e-9), 1)
        return Report(facts, facts_table(facts), 1 if result.failed else 0)

    execute(work, json, debug)
