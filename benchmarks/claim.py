"""The output of every benchmark: one JSON line per claim on standard output, everything else on standard error."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TextIO

_OUTPUT: TextIO = sys.stdout


def claims_only_on_stdout() -> None:
    """Send whatever libraries print to standard error, so that standard output holds claims and nothing else."""
    sys.stdout = sys.stderr


def note(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def skip(claim: str, reason: str) -> None:
    """This claim was not measured."""
    print(json.dumps({"claim": claim, "skipped": reason}), file=_OUTPUT, flush=True)


def report(
    claim: str,
    *,
    values: Sequence[float],
    target: float,
    better: Literal["higher", "lower"],
    unit: str,
    ours: float,
    peer: str,
    peer_value: float,
    quick: bool,
) -> None:
    """Print a claim. `values` has one entry per repetition: the value is their median, the spread the distance between
    their quartiles. `ours` and `peer_value` are the two measurements behind the value, in the order of its name."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    line = {
        "claim": claim,
        "value": _rounded(statistics.median(values)),
        "target": target,
        "better": better,
        "unit": unit,
        "ours": _rounded(ours),
        "peer": peer,
        "peer_value": _rounded(peer_value),
        "runs": len(values),
        "spread": _rounded(quartiles[2] - quartiles[0]),
        "quick": quick,
        "commit": commit(),
    }
    print(json.dumps(line), file=_OUTPUT, flush=True)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times as fast, step by step."""
    return [one / other for one, other in zip(slow, fast, strict=True)]


def commit() -> str:
    """The checked-out commit, with a plus sign where files differ from it."""
    here = Path(__file__).parent
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
    )
    return shown.stdout.strip() or "unknown"


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
