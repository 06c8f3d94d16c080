"""Short names and values of a trial's parameters, the same in table, pictures and report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayft.tune.rows import TrialRow


def paths_of(rows: Iterable[TrialRow]) -> list[str]:
    """The recipe paths that the trials vary, in the order of the space; those with one value for all are left out."""
    values: dict[str, list[Any]] = {}
    count = 0
    for row in rows:
        count += 1
        for path, value in row.values.items():
            values.setdefault(path, []).append(value)
    varied = [path for path, seen in values.items() if len(seen) < count or any(one != seen[0] for one in seen)]
    return varied or list(values)


def labels(paths: Sequence[str]) -> dict[str, str]:
    """Recipe path -> its last part, or as many parts as tell it from the others: `rank`, `adapter.dropout`."""
    short = {}
    for path in paths:
        parts = path.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        short[path] = next(
            (tail for tail in tails if sum(other == tail or other.endswith(f".{tail}") for other in paths) == 1), path
        )
    return short


def shown(value: Any) -> str:
    """8, 3.2e-4, true, none, q+v_proj for [q_proj, v_proj]."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return re.sub(r"e([+-])0?(\d)", lambda found: f"e{found[1].replace('+', '')}{found[2]}", f"{value:.3g}")
    if isinstance(value, list | tuple):
        return _joined([shown(item) for item in value])
    if isinstance(value, Mapping):
        return " ".join(f"{key}={shown(item)}" for key, item in value.items())
    return str(value)


def described(row: TrialRow, paths: Sequence[str]) -> str:
    """rank=8 learning_rate=3.2e-4; what does not apply to the trial is left out."""
    short = labels(paths)
    return " ".join(f"{short[path]}={shown(row.values[path])}" for path in paths if path in row.values)


def _joined(items: list[str]) -> str:
    ending = "_" + items[0].rpartition("_")[2] if items else ""
    if len(items) > 1 and all(item.endswith(ending) and item != ending for item in items):
        return "+".join(item.removesuffix(ending) for item in items) + ending
    return "+".join(items) or "none"
