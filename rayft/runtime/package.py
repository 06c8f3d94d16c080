"""Pack a recipe and the small files it names into one folder: the working directory of a Ray job."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rayft.config import Resolved
from rayft.errors import UsageError

UPLOAD_LIMIT = 100 * 2**20
"""Bytes; Ray refuses larger working directories."""


@dataclass(frozen=True)
class Package:
    """A folder with ``recipe.yaml``, whose paths are relative to it, and ``files`` (relative name -> size in bytes)."""

    folder: Path
    files: dict[str, int]


def pack(resolved: Resolved, folder: Path, modules_from: Path) -> Package:
    """Copy the recipe (the user's own values) and every local file it names into ``folder``.

    What does not exist on this machine (Hub ids, bucket URIs, paths that only the cluster has) stays as it is written.
    ``modules_from`` is where modules that the recipe names by import path are looked for; installed ones are left out.
    Raises UsageError R511 when the files are larger than a job may upload; nothing has been copied then.
    """
    recipe = user_values(resolved)
    copies: dict[str, Path] = {}
    for section, key in _paths(recipe):
        section[key] = _packed(section[key], copies)
    for name in _modules(recipe):
        for source in (modules_from / name, modules_from / f"{name}.py"):
            if source.exists():
                copies |= _tree(source, source.name)
    _check_size(list(copies.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    YAML().dump(recipe, folder / "recipe.yaml")
    return Package(folder, {name: source.stat().st_size for name, source in copies.items()})


def user_values(resolved: Resolved) -> dict[str, Any]:
    """What the user decided, as plain data: defaults and derived values are filled in again where the job runs."""
    recipe = resolved.recipe.model_dump(mode="json", exclude_defaults=True)
    for path in (path for path, origin in resolved.origin.items() if origin == "derived"):
        section, key = path.split(".")
        if recipe.get(section, {}).pop(key, None) is not None and not recipe[section]:
            del recipe[section]
    return recipe


def _paths(recipe: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value of the recipe that may be a path."""
    data, train, evaluate = (recipe.get(name, {}) for name in ("data", "train", "evaluate"))
    for sources in (data.get("train"), data.get("validation")):
        for source in sources if isinstance(sources, list) else []:
            yield source, "path"
    metrics = evaluate.get("metrics", [])
    yield from ((metrics, index) for index in range(len(metrics)))
    named = [
        (recipe.get("model"), "base"),
        (recipe.get("adapter"), "init_from"),
        (data, "chat_template"),
        (data, "function"),
        (train, "loss_function"),
    ]
    yield from ((section, key) for section, key in named if section and section.get(key))


def _packed(value: str, copies: dict[str, Path]) -> str:
    """The value with its local path replaced by the place in the package; ``copies`` collects what goes where."""
    path, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    if not path.startswith("/"):  # resolving made every local path absolute
        return value
    place = f"files/{len({name.split('/')[1] for name in copies})}"
    if glob.has_magic(path) and not Path(path).exists():
        root = Path(*_until_magic(Path(path).parts))
        matches = [Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file()]
        copies |= {f"{place}/{match.relative_to(root).as_posix()}": match for match in matches}
        return f"{place}/{Path(path).relative_to(root).as_posix()}" if matches else value
    if not Path(path).exists():
        return value
    name = f"{place}/{Path(path).name}"
    copies |= _tree(Path(path), name)
    return f"{name}{colon}{function}"


def _until_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _tree(source: Path, name: str) -> dict[str, Path]:
    """A file, or all files of a folder: name in the package -> file."""
    if source.is_file():
        return {name: source}
    files = (file for file in sorted(source.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)
    return {f"{name}/{file.relative_to(source).as_posix()}": file for file in files}


def _modules(recipe: dict[str, Any]) -> Iterator[str]:
    """Top-level names of the functions that are given as ``package.module:function``."""
    functions = [recipe.get("data", {}).get("function"), recipe.get("train", {}).get("loss_function")]
    for function in [*functions, *recipe.get("evaluate", {}).get("metrics", [])]:
        if function and ":" in function and ".py:" not in function:
            yield function.split(":")[0].split(".")[0]


def _check_size(files: list[Path]) -> None:
    sizes = sorted(((file.stat().st_size, file) for file in files), reverse=True)
    total = sum(size for size, _ in sizes)
    if total <= UPLOAD_LIMIT:
        return
    largest = ", ".join(f"{file} ({size / 2**20:.1f} MiB)" for size, file in sizes[:5])
    raise UsageError(
        "R511",
        f"the files of this recipe take {total / 2**20:.1f} MiB, and a job may upload {UPLOAD_LIMIT / 2**20:.0f} MiB; "
        f"the largest: {largest}",
        "put large files where the cluster sees them and name them by URI (s3://..., file:///shared/...) or Hub id",
    )
