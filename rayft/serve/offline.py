"""`generate`: answers to a file of prompts, on as many engines as there are workers, and never twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rayft.config.recipe import Recipe
from rayft.errors import RunStopped, UsageError
from rayft.home import home
from rayft.inference.request import SamplingParams
from rayft.runs.lines import Lines, read_lines
from rayft.runs.storage import Location, locate, lock, write_atomic
from rayft.serve.contents import contents
from rayft.serve.offline_items import read_items
from rayft.serve.offline_workers import compute
from rayft.serve.plan import Plan, plan


@dataclass(frozen=True)
class Generated:
    """What became of a file of prompts."""

    path: str
    answered: int
    """Now; not those that were there already."""
    skipped: int
    """Answered before, with the same model and the same fields."""
    failed: int
    """Lines that say `error` in place of an answer."""
    prompt_tokens: int
    completion_tokens: int
    """Of the answers given now."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    source: str | Path | Mapping[str, Any] | Recipe | Sequence[Any] | None,
    overrides: Sequence[str] = (),
    *,
    input: str,
    output: str,
    defaults: SamplingParams | None = None,
    console: Console | None = None,
) -> Generated:
    """Answer every line of ``input``, in its order in ``output``.

    source: as for `deploy`; with several adapters, lines say which one answers. What was answered before is kept, also
    after a kill: finished shards stand in ``output``.partial until all are there. defaults: for lines that do not say
    (greedy, at most 256 tokens).

    Raises:
        UsageError: R870, R871 (input), R872 (output); R860, R861 and those of recipe, base, references and cluster.
        RunStopped: R873, interrupted; the same command goes on.
        RunFailed: R874, the workers died again and again.
    """
    began = time.monotonic()
    sources: list[Any] = [] if source is None else list(source) if isinstance(source, list | tuple) else [source]
    planned = plan(sources, overrides)
    adapters = contents(planned)
    target, journal_at = locate(output), locate(f"{output}.partial")
    defaults = defaults or SamplingParams(max_new_tokens=256)
    items = read_items(locate(input), defaults, adapters, _model(planned))
    with ExitStack() as stack:
        if target.is_local:
            target.local.parent.mkdir(parents=True, exist_ok=True)
            held = lock(f"{output}.lock")
            stack.callback(Path(held.lock_file).unlink, missing_ok=True)
            stack.callback(held.release)
        journal = Lines(journal_at, home() / "generate" / hashlib.sha256(output.encode()).hexdigest()[:12])
        known = {line["id"]: line for line in (*_former(target), *journal.read()) if "error" not in line}
        known = {item.id: known[item.id] for item in items if known.get(item.id, {}).get("key") == item.key}
        missing = [item for item in items if item.id not in known]
        new: dict[str | int, dict[str, Any]] = {}
        bar = stack.enter_context(_bar(console, len(items), len(known)))

        def take(lines: Sequence[dict[str, Any]]) -> None:
            for line in lines:
                journal.append(line)
                new[line["id"]] = line
            bar.update(bar.task_ids[0], completed=len(known) + len(new))

        try:
            if missing:
                compute(planned, missing, take)
        except KeyboardInterrupt:
            journal.flush()
            done = f"{len(known) + len(new)} of {len(items)} lines are answered"
            raise RunStopped("R873", f"interrupted; {done}", "the same command goes on") from None
        lines = known | new
        write_atomic(target, "".join(json.dumps(lines[item.id], ensure_ascii=False) + "\n" for item in items))
        if journal_at.is_file():
            journal_at.remove()
    usage = [line["usage"] for line in new.values() if "usage" in line]
    return Generated(
        path=output,
        answered=len(usage),
        skipped=len(known),
        failed=len(new) - len(usage),
        prompt_tokens=sum(each["prompt_tokens"] for each in usage),
        completion_tokens=sum(each["completion_tokens"] for each in usage),
        seconds=time.monotonic() - began,
    )


def _model(planned: Plan) -> str:
    """What answers depend on beside the line: base, number format, template."""
    section = planned.recipe.model
    facts = [planned.base_hash, section.dtype, section.quantization, planned.recipe.data.chat_template]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _former(target: Location) -> list[dict[str, Any]]:
    """Lines of an earlier run. Raises UsageError R872 for a file that is something else."""
    try:
        lines = read_lines(target)
        if all(isinstance(line, dict) and {"id", "key"} <= line.keys() for line in lines):
            return lines
    except UsageError:
        pass
    raise UsageError("R872", f"{target} is there already, and no output of `rayft generate`", "choose another --output")


def _bar(console: Console | None, total: int, done: int) -> Progress:
    console = console or Console(stderr=True)
    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    bar.add_task("answers", total=total, completed=done)
    return bar
