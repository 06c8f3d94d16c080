"""`report.md` of a sweep: the winner, what it cost, what was saved, how sure we are, and what to do next."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rayft.runs.changes import changes
from rayft.runs.folder import RunFolder
from rayft.train.markdown import number, table
from rayft.train.progress import duration, shorten
from rayft.tune.gallery import Picture, draw
from rayft.tune.objective import Objective, ranking, standing, winners
from rayft.tune.outcome import Outcome, Speed
from rayft.tune.repeats import overlap
from rayft.tune.rows import TrialRow
from rayft.tune.table import counts
from rayft.tune.words import labels, paths_of, shown

OWN_KEYS = ("name", "storage", "tune")
"""Keys in which the winner's recipe differs from the sweep's because it is another run."""


def save_report(folder: RunFolder, outcome: Outcome) -> None:
    """Write `report.md` and its pictures into the sweep's run folder."""
    with tempfile.TemporaryDirectory() as scratch:
        pictures = draw(outcome, Path(scratch))
        for picture in pictures:
            if picture.file:
                folder.write_file(picture.file, Path(scratch, picture.file).read_bytes())
    folder.write_file("report.md", write_report(outcome, pictures))


def write_report(outcome: Outcome, pictures: Sequence[Picture] = ()) -> str:
    """The Markdown text; the pictures lie beside it."""
    sections = [
        ("", f"# {outcome.name}"),
        ("", _headline(outcome)),
        ("Best trial" if len(outcome.objectives) == 1 else "Best trials", _best(outcome)),
        ("How it ran", _how(outcome)),
        ("Early exit", _early_exit(outcome)),
        ("Speed", _speed(outcome.speed) if outcome.speed else ""),
        ("Repeats with other seeds", _repeats(outcome)),
        *((picture.title, _picture(picture)) for picture in pictures),
        ("Trials", _trials(outcome)),
        ("Failures", _failures(outcome.rows)),
        ("On the way", "\n".join(f"- {shorten(event, 400)}" for event in outcome.events)),
        ("Next", _next(outcome)),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text) + "\n"


def examples_not_run(outcome: Outcome, state: str) -> int:
    """Examples of their full budgets that the trials in this state left out (rows of several, with packing)."""
    return sum((row.total_steps - row.step) * _batch(outcome, row) for row in outcome.rows if row.state == state)


def full_budget(outcome: Outcome) -> int:
    """Examples that the trials that have ended would have run to their last steps."""
    return sum(row.total_steps * _batch(outcome, row) for row in outcome.rows if row.ended)


def _batch(outcome: Outcome, row: TrialRow) -> int:
    return int(row.values.get("train.global_batch_size", outcome.start.train.global_batch_size))


def _headline(outcome: Outcome) -> str:
    best, objectives = winners(outcome.rows, outcome.objectives), outcome.objectives
    if not best:
        return f"No trial has a result: {counts(outcome.rows, len(outcome.rows))}."
    ended = sum(row.ended for row in outcome.rows)
    if len(objectives) > 1:
        names = " and ".join(objective.metric for objective in objectives)
        return f"{len(best)} of {ended} trials are the best trade-offs between {names}."
    return f"Best of {ended} trials: trial {best[0].number} with {_results(best[0], objectives)}."


def _best(outcome: Outcome) -> str:
    best = winners(outcome.rows, outcome.objectives)
    if not best:
        return ""
    parts = []
    if len(outcome.objectives) > 1:
        paths = paths_of(outcome.rows)
        head = ["trial", *(objective.metric for objective in outcome.objectives), *(labels(paths)[p] for p in paths)]
        cells = [[str(row.number), *_values(row, outcome.objectives), *_parameters(row, paths)] for row in best]
        parts.append(table(head, cells))
    if outcome.best is not None:
        saved = f"Trial {best[0].number} is saved in `adapter/`, its recipe in `best.yaml`."
        parts.append(saved if len(best) == 1 else f"{saved} It has the best {outcome.objectives[0].metric}.")
        found = [one for one in changes(outcome.start, outcome.best) if one.key.split(".")[0] not in OWN_KEYS]
        lines = "\n".join(f"- `{change}`" for change in found)
        parts.append(f"What it changes in the start recipe:\n\n{lines}" if found else "It is the start recipe.")
    return "\n\n".join(parts)


def _how(outcome: Outcome) -> str:
    lines = [
        ("trials", counts(outcome.rows, len(outcome.rows))),
        ("mode", f"{outcome.mode}: {outcome.reason}"),
        ("objective" if len(outcome.objectives) == 1 else "objectives",
         ", ".join(f"{'lowest' if one.mode == 'min' else 'highest'} `{one.metric}`" for one in outcome.objectives)),
        *((name, shown(value)) for name, value in outcome.settings.items()),
    ]  # fmt: skip
    if outcome.seconds:
        lines.append(("wall time", duration(outcome.seconds)))
    trained = sum(row.seconds for row in outcome.rows)
    if trained:
        lines.append(("training time of all trials", duration(trained)))
    peaks = [row.facts["peak_memory_gb"] for row in outcome.rows if row.facts.get("peak_memory_gb") is not None]
    if peaks:
        lines.append(("peak memory", f"{max(peaks):.2f} GB"))
    return table(["", ""], lines)


def _early_exit(outcome: Outcome) -> str:
    whole = full_budget(outcome)
    if not whole:
        return ""
    unit = "rows" if outcome.start.data.packing else "examples"
    left = {state: examples_not_run(outcome, state) for state in ("pruned", "failed")}
    if not any(left.values()):
        return f"No trial was stopped: all {whole:,} {unit} were run."
    lines = [
        (state, str(sum(row.state == state for row in outcome.rows)), f"{many:,}", f"{many / whole:.0%}")
        for state, many in left.items()
    ]
    listed = table(["", "trials", f"{unit} not run", "share of the full budget"], lines)
    ran = whole - sum(left.values())
    return f"{listed}\n\nTo their last steps all trials together would have run {whole:,} {unit}; they ran {ran:,}."


def _speed(speed: Speed) -> str:
    ratio = speed.tokens_per_second / speed.sequential
    verdict = f"{ratio:.2f} times as fast as one trial after another"
    if ratio < 1:
        verdict += "; sharing does not pay here (`tune.execution: classic`, or a smaller `tune.pack_size`)"
    lines = [
        ("this sweep", f"{speed.tokens_per_second:,.0f} tokens/s"),
        (f"one trial after another ({speed.basis})", f"{speed.sequential:,.0f} tokens/s"),
    ]
    return f"{table(['', ''], lines)}\n\nThe sweep trained {verdict}. Early exit is not counted here."


def _repeats(outcome: Outcome) -> str:
    if not outcome.repeats:
        return ""
    objective = outcome.objectives[0]
    searched = {row.number: objective.of(row) for row in outcome.rows}
    lines = []
    for repeat in outcome.repeats:
        half = repeat.half_width()
        mean = number(repeat.mean())
        interval = f"{mean} ± {number(half)}" if half is not None else mean
        count = f"{len(repeat.known)}" + (f" of {len(repeat.values)}" if len(repeat.known) < len(repeat.values) else "")
        lines.append((str(repeat.trial), number(searched.get(repeat.trial)), interval, count))
    head = ["trial", f"{objective.metric} in the search", "mean of further seeds, 95% interval", "seeds"]
    return f"{table(head, lines)}\n\n{_verdict(outcome)}".rstrip()


def _verdict(outcome: Outcome) -> str:
    """Whether the seeds agree with the search."""
    objective = outcome.objectives[0]
    means = [(objective.cost(mean), repeat) for repeat in outcome.repeats if (mean := repeat.mean()) is not None]
    if len(means) < 2:
        return ""
    (_, first), (_, second), *_ = sorted(means, key=lambda item: item[0])
    together = overlap(first, second)
    said = f"Trial {first.trial} has the best mean."
    if together is not None:
        said += f" Its interval {'overlaps that' if together else 'lies apart from that'} of trial {second.trial}"
        said += ": with these seeds the two cannot be told apart." if together else "."
    return said


def _picture(picture: Picture) -> str:
    image = f"![{picture.title}]({picture.file})\n\n" if picture.file else ""
    return image + picture.note


def _trials(outcome: Outcome) -> str:
    """All trials, the best first, then by how far they came."""
    paths = paths_of(outcome.rows)
    order = ranking(outcome.rows, outcome.objectives) + standing(outcome.rows, outcome.objectives[0])
    by_number = {row.number: row for row in [*order, *outcome.rows]}
    if not by_number:
        return ""
    names = labels(paths)
    head = ["trial", "state", "step", *(one.metric for one in outcome.objectives), *(names[path] for path in paths)]
    lines = [
        [
            str(row.number),
            row.state,
            f"{row.step}/{row.total_steps}",
            *_values(row, outcome.objectives),
            *_parameters(row, paths),
            duration(row.seconds),
        ]
        for row in by_number.values()
    ]
    return table([*head, "time"], lines)


def _failures(rows: Sequence[TrialRow]) -> str:
    lines = [
        (str(row.number), str(row.step), shorten(str(row.facts.get("reason") or "not known"), 400))
        for row in rows
        if row.state == "failed"
    ]
    return table(["trial", "step", "reason"], lines) if lines else ""


def _next(outcome: Outcome) -> str:
    lines = []
    if outcome.best is not None:
        best = shlex.quote(f"{outcome.path}/best.yaml")
        lines += [
            f"rayft train {best}    # the winner once more, with its full budget",
            f"rayft evaluate run:{outcome.name}    # its adapter on the validation data, beside the base",
        ]
    if any(not row.ended for row in outcome.rows) or not lines:
        lines.append(f"rayft tune {shlex.quote(f'{outcome.path}/recipe.yaml')} --resume    # go on with the trials")
    return "```sh\n" + "\n".join(lines) + "\n```"


def _results(row: TrialRow, objectives: Sequence[Objective]) -> str:
    return ", ".join(f"{objective.metric} {number(objective.of(row))}" for objective in objectives)


def _values(row: TrialRow, objectives: Sequence[Objective]) -> list[str]:
    return [number(objective.of(row)) for objective in objectives]


def _parameters(row: TrialRow, paths: Sequence[str]) -> list[str]:
    return [shown(row.values[path]) if path in row.values else "-" for path in paths]
