"""What the driver's screen shows of a sweep: the table, and the same in plain lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayft.train.progress import duration, shorten
from rayft.tune.objective import Objective, ranking, winners
from rayft.tune.pace import trial_seconds_left
from rayft.tune.rows import TrialRow
from rayft.tune.words import described, labels, paths_of, shown

MOST_ROWS = 13
"""Trials in the table: with head and foot it has at most 20 lines."""
MOST_BEST = 3
VALUE_WIDTH, GAP = 16, 2
COLOURS = {"running": "cyan", "waiting": "yellow", "complete": "green", "pruned": "bright_black", "failed": "red"}


def render(
    rows: Sequence[TrialRow],
    objectives: Sequence[Objective],
    *,
    title: str,
    total: int,
    width: int,
    elapsed: float = 0.0,
    left: float | None = None,
) -> RenderableType:
    """The table of a sweep as it stands, at most 20 lines of at most `width` columns.

    total: trials that the sweep will have. elapsed, left: seconds since its start and to its end, None = not known.
    """
    best = winners(rows, objectives)
    picked = _picked(rows, best if len(objectives) > 1 else ranking(rows, objectives))
    parts: list[RenderableType] = [_headline(rows, title, total), _bestline(best, objectives, elapsed, left)]
    if picked:
        table, hidden = _table(rows, picked, {row.number for row in best}, objectives, width)
        parts += [table, *_footer(rows, picked, hidden)]
    return Group(*parts)


def summary(
    rows: Sequence[TrialRow], objectives: Sequence[Objective], total: int, elapsed: float, left: float | None
) -> str:
    """One line: how far the sweep is."""
    return f"{counts(rows, total)}; {_bestline(winners(rows, objectives), objectives, elapsed, left).plain}"


def line(row: TrialRow, objectives: Sequence[Objective], paths: Sequence[str], best: bool) -> str:
    """One line about a trial that has ended."""
    parts = [f"trial {row.number} {row.state}", f"step {row.step}/{row.total_steps}"]
    parts += [f"{objective.metric} {_value(objective.of(row))}" for objective in objectives]
    parts += [duration(row.seconds), described(row, paths)]
    parts += ["(best so far)"] if best else []
    parts += [shorten(row.facts["reason"])] if row.facts.get("reason") else []
    return "  ".join(part for part in parts if part)


def _headline(rows: Sequence[TrialRow], title: str, total: int) -> Text:
    return Text.assemble((title, "bold"), f"  {counts(rows, total)}")


def counts(rows: Sequence[TrialRow], total: int) -> str:
    """3 of 16 trials: 1 complete, 2 pruned, 8 running."""
    ended = sum(row.ended for row in rows)
    return f"{ended} of {total} trials" + (f": {_states(rows)}" if rows else "")


def _states(rows: Sequence[TrialRow]) -> str:
    counted: Counter[str] = Counter(row.state for row in rows)
    order = ("complete", "pruned", "failed", "running", "waiting")
    return ", ".join(f"{counted[state]} {state}" for state in order if counted[state])


def _bestline(best: Sequence[TrialRow], objectives: Sequence[Objective], elapsed: float, left: float | None) -> Text:
    parts = []
    if best and len(objectives) == 1:
        parts.append(f"best {objectives[0].metric} {_value(objectives[0].of(best[0]))} (trial {best[0].number})")
    elif best:
        parts.append(f"Pareto front: trial{'s' if len(best) > 1 else ''} {', '.join(str(row.number) for row in best)}")
    parts.append(duration(elapsed))
    if left is not None:
        parts.append(f"ETA {duration(left)}")
    return Text("  ".join(parts), overflow="ellipsis", no_wrap=True)


def _picked(rows: Sequence[TrialRow], order: Sequence[TrialRow]) -> list[TrialRow]:
    """The best ones, those at work, and the latest of the others, in the order of their numbers."""
    latest = sorted(rows, key=lambda row: (not row.ended, -row.number))
    first = [*order[:MOST_BEST], *(row for row in rows if row.state == "running"), *latest]
    numbers = dict.fromkeys(row.number for row in first)
    kept = set(list(numbers)[:MOST_ROWS])
    return [row for row in sorted(rows, key=lambda row: row.number) if row.number in kept]


def _table(
    rows: Sequence[TrialRow],
    picked: Sequence[TrialRow],
    best: Collection[int],
    objectives: Sequence[Objective],
    width: int,
) -> tuple[Table, list[str]]:
    """The table, and the names of the parameters for which it has no room."""
    paths = paths_of(rows)
    short = labels(paths)
    parameters = {short[path]: [_clipped(row, path) for row in picked] for path in paths}
    others: dict[str, list[str]] = {
        "trial": [f"{'★' if row.number in best else ' '} {row.number}" for row in picked],
        "step": [f"{row.step}/{row.total_steps}" for row in picked],
        **{objective.metric: [_value(objective.of(row)) for row in picked] for objective in objectives},
        "state": [row.state for row in picked],
        "ETA": [_eta(row) for row in picked],
    }
    room = width - sum(_width(name, cells) + GAP for name, cells in others.items()) + GAP
    hidden = []
    for path in sorted(paths, key=lambda path: -_variety(rows, path)):
        needed = _width(short[path], parameters[short[path]]) + GAP
        if needed <= room:
            room -= needed
        else:
            hidden.append(short[path])
            del parameters[short[path]]
    columns = {"trial": others.pop("trial"), **parameters, **others}
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for name in columns:
        numeric = name not in parameters and name != "state"
        table.add_column(_head(name), no_wrap=True, justify="right" if numeric else "left", vertical="bottom")
    for row, *cells in zip(picked, *columns.values(), strict=True):
        style = "bold green" if row.number in best else COLOURS[row.state]
        table.add_row(*cells, style=style)
    return table, hidden


def _footer(rows: Sequence[TrialRow], picked: Sequence[TrialRow], hidden: Sequence[str]) -> list[Text]:
    notes = []
    shown_numbers = {row.number for row in picked}
    rest = [row for row in rows if row.number not in shown_numbers]
    if rest:
        notes.append(f"and {len(rest)} more: {_states(rest)}")
    if hidden:
        notes.append(f"no room for {', '.join(hidden)}")
    return [Text(note, style="bright_black", overflow="ellipsis", no_wrap=True) for note in notes]


def _head(name: str) -> str:
    """On two lines where that is narrower."""
    cuts = [at + 1 for at, letter in enumerate(name) if letter in "_." and at + 1 < len(name)]
    if not cuts or len(name) <= 8:
        return name
    cut = min(cuts, key=lambda at: max(at, len(name) - at))
    return f"{name[:cut]}\n{name[cut:]}"


def _width(name: str, cells: Sequence[str]) -> int:
    return max(map(len, [*_head(name).split("\n"), *cells]))


def _variety(rows: Sequence[TrialRow], path: str) -> int:
    """How many values the trials have: what varies most says most about a trial."""
    return len({shown(row.values[path]) for row in rows if path in row.values})


def _clipped(row: TrialRow, path: str) -> str:
    text = shown(row.values[path]) if path in row.values else "-"
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 1]}…"


def _eta(row: TrialRow) -> str:
    left = trial_seconds_left(row)
    return "" if left is None else duration(left)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
