"""The user's own row function, `data.function`: from an import path to a callable."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rayft.data.sources import Row
from rayft.errors import UsageError

RowFunction = Callable[[dict[str, Any]], dict[str, Any] | None]


def load(spec: str) -> RowFunction:
    """The function named by `package.module:function` or `file.py:function`. Raises UsageError R205."""
    module, name = _module(spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError("R205", f"data.function: {spec}: {module.__name__} has no function {name!r}")
    return function


def digest(spec: str) -> str:
    """sha256 of the file in which the function is written: a change there makes a new prepared data set."""
    module, _ = _module(spec)
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


def _module(spec: str) -> tuple[ModuleType, str]:
    place, colon, name = spec.rpartition(":")
    if not colon:
        raise UsageError(
            "R205", f"data.function: {spec!r} names no function", "write package.module:function or file.py:function"
        )
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place), name
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert found is not None and found.loader is not None  # given for every name that ends in .py
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except Exception as error:  # importing runs the user's code
        raise UsageError(
            "R205", f"data.function: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module, name
