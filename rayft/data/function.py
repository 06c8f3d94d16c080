"""The user's own row function, `data.function`: from an import path to a callable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayft.data.sources import Row
from rayft.errors import UsageError
from rayft.functions import load_function, load_module

RowFunction = Callable[[dict[str, Any]], dict[str, Any] | None]


def load(spec: str) -> RowFunction:
    """The function named by `package.module:function` or `file.py:function`. Raises UsageError R205."""
    return load_function(spec, "data.function", "R205")


def digest(spec: str) -> str:
    """sha256 of the file in which the function is written: a change there makes a new prepared data set."""
    module, _ = load_module(spec, "data.function", "R205")
    return hashlib.sha256(Path(module.__file__).read_bytes() if module.__file__ else spec.encode()).hexdigest()


def apply(function: RowFunction, row: Row) -> Row | None:
    """The row as the function returns it; None when the function drops it. Raises UsageError R205."""
    try:
        values = function(dict(row.values))
    except Exception as error:  # the user's code may raise anything; the message must name the row
        raise UsageError("R205", f"data.function failed at {row.where}: {type(error).__name__}: {error}") from error
    if values is None:
        return None
    if not isinstance(values, dict):
        raise UsageError(
            "R205", f"data.function returned a {type(values).__name__} at {row.where}", "return a dict or None"
        )
    return Row(values, row.where)
