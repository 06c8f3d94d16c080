"""The user's own functions, by import path: `package.module:function` or `file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rayft.errors import UsageError


def load_function(spec: str, key: str, error_id: str) -> Callable[..., Any]:
    """The function that `spec` names. Raises UsageError `error_id`, which names `key`, when there is none."""
    module, name = load_module(spec, key, error_id)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(error_id, f"{key}: {spec}: {module.__name__} has no function {name!r}")
    return function


def load_module(spec: str, key: str, error_id: str) -> tuple[ModuleType, str]:
    """(module, name of the function) of an import path."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        hint = "write package.module:function or file.py:function"
        raise UsageError(error_id, f"{key}: {spec!r} names no function", hint)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place), name
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert found is not None and found.loader is not None  # given for every name that ends in .py
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except Exception as error:  # importing runs the user's code
        raise UsageError(error_id, f"{key}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    return module, name
