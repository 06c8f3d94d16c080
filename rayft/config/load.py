"""`load`: the one way from what a user wrote to a resolved, valid recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayft.config.compatibility import check
from rayft.config.document import Document, plain
from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved, resolve
from rayft.config.validate import validate


def load(source: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Sequence[str] = ()) -> Resolved:
    """Read, override, validate and resolve a recipe.

    `source` is a YAML file, a run folder, plain data, a `Recipe` object, or None when the overrides say everything.
    Overrides are `a.b=value` with YAML 1.2 values; the last one wins. Relative paths are taken against the working
    directory.

    Raises UsageError (exit code 2): R100 several problems, R101 no such file, R102 not YAML, R103 bad override,
    R104 unknown key, R105 wrong type or value, R106 missing key, R107 impossible combination, R108 a passed-through
    argument that would break a promise, R109 relative storage inside a Ray job.
    """
    document = _document(source)
    for text in overrides:
        document.override(text)
    resolved = resolve(validate(document), document.data)
    check(resolved.recipe)
    return resolved


def _document(source: str | Path | Mapping[str, Any] | Recipe | None) -> Document:
    if source is None:
        return Document()
    if isinstance(source, Recipe):
        return Document(source.model_dump(mode="json", exclude_unset=True))
    if isinstance(source, Mapping):
        return Document(plain(source))
    return Document.read(Path(source))
