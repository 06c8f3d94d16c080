"""What is scored: trained weights with held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.runs import subject as subjects
from rayft.runs.subject import Subject


def subject(source: str | Path | Mapping[str, Any] | Recipe | None, overrides: Sequence[str]) -> Subject:
    """What `runs.subject` finds, and examples to score it on. For a folder outside a run they must be named.

    Raises:
        UsageError: R703 nothing is held out, R705 a folder outside a run without data; R1xx of the recipe, R4xx of the
            reference.
    """
    found = subjects.subject(source, overrides, data=subjects.overridden("data.validation", overrides))
    if found.recipe.data.validation is None:
        raise UsageError(
            "R703",
            "data.validation: nothing is held out to score on",
            "data.validation=FILE, or a fraction of data.train such as data.validation=0.1",
        )
    return found
