"""The resolved recipe: derived values filled in, paths made absolute, and for each value who decided it."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayft.config.data import as_sources
from rayft.config.plain import block, leaves
from rayft.config.recipe import Recipe
from rayft.errors import UsageError

Origin = Literal["user", "default", "derived"]

VIRTUAL_TOKEN_METHODS = ("prefix", "prompt", "p_tuning")
_DATA_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather"),
    *(".gz", ".bz2", ".zst", ".lz4"),
)


@dataclass(frozen=True)
class Resolved:
    """A valid recipe and the origin of each of its values, by dotted path (`data.train.0.path`)."""

    recipe: Recipe
    origin: dict[str, Origin]

    def dry(self) -> list[tuple[str, Any, Origin]]:
        """Every value as (dotted path, plain value, origin), in the order of the recipe."""
        return [(path, value, self.origin[path]) for path, value in leaves(self.recipe.model_dump(mode="json"))]

    def to_yaml(self) -> str:
        """The whole recipe as YAML; each line's comment says who decided the value. Loads back to the same recipe."""
        lines = []
        for line, path in block(self.recipe.model_dump(mode="json")):
            lines.append(f"{line:<59} # {self.origin[path]}" if path else line)
        return "\n".join(lines) + "\n"


def resolve(recipe: Recipe, user: dict[str, Any]) -> Resolved:
    """Fill in what follows from other keys. `user` is the plain data that the user wrote.

    Derived: `train.learning_rate`; `data.train_on: all` for clm; `data.padding_free: false` for methods that put
    virtual tokens in front of each row. Raises UsageError R109 for a relative storage inside a Ray job.
    """
    written = {path for path, _ in leaves(_with_source_lists(user))}
    values: dict[str, Any] = {}
    if recipe.train.learning_rate is None:
        values["train.learning_rate"] = 2e-4 if recipe.adapter else 1e-5
    if recipe.train.objective == "clm" and "data.train_on" not in written:
        values["data.train_on"] = "all"
    if recipe.adapter and recipe.adapter.method in VIRTUAL_TOKEN_METHODS and "data.padding_free" not in written:
        values["data.padding_free"] = False
    plain = recipe.model_dump(mode="json")
    for path, value in values.items():
        section, key = path.split(".")
        plain[section][key] = value
    _make_paths_absolute(plain)
    resolved = Recipe.model_validate(plain)
    origin: dict[str, Origin] = {}
    for path, _ in leaves(resolved.model_dump(mode="json")):
        origin[path] = "derived" if path in values else "user" if path in written else "default"
    return Resolved(resolved, origin)


def _with_source_lists(user: dict[str, Any]) -> dict[str, Any]:
    """The user's data with the short forms of `data.train` and `data.validation` spelt out as in the recipe."""
    data = user.get("data")
    if not isinstance(data, dict):
        return user
    short = {key: data[key] for key in ("train", "validation") if isinstance(data.get(key), str | dict | list)}
    return {**user, "data": {**data, **{key: as_sources(value) for key, value in short.items()}}}


def _make_paths_absolute(plain: dict[str, Any]) -> None:
    """Workers run in another folder, so every local path is taken against the working directory here, once."""
    if "://" not in plain["storage"] and not os.path.isabs(os.path.expanduser(plain["storage"])):
        _refuse_in_job(plain["storage"])
    plain["storage"] = _absolute(plain["storage"])
    plain["model"]["base"] = _absolute_if_local(plain["model"]["base"], (".gguf",))
    for source in [*plain["data"]["train"], *_listed(plain["data"]["validation"])]:
        source["path"] = _absolute_if_local(source["path"], _DATA_SUFFIXES)
    template = plain["data"]["chat_template"]
    if template and "{" not in template and "\n" not in template:
        plain["data"]["chat_template"] = _absolute(template)
    adapter = plain["adapter"]
    if adapter and adapter["init_from"] and not adapter["init_from"].startswith("run:"):
        adapter["init_from"] = _absolute(adapter["init_from"])
    for section, key in (("data", "function"), ("train", "loss_function")):
        if plain[section][key]:
            plain[section][key] = _absolute_function(plain[section][key])
    plain["evaluate"]["metrics"] = [_absolute_function(name) for name in plain["evaluate"]["metrics"]]


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(os.path.expanduser(path)).absolute())


def _absolute_if_local(name: str, suffixes: tuple[str, ...]) -> str:
    """A name that can also be a Hub id, an alias or a run is a path when it looks like one or something lies there."""
    if name.startswith("run:") or "://" in name:
        return name
    looks_local = name.startswith((".", "/", "~")) or name.lower().endswith(suffixes)
    if looks_local or os.path.exists(name) or (glob.has_magic(name) and glob.glob(name, recursive=True)):
        return _absolute(name)
    return name


def _absolute_function(name: str) -> str:
    """`file.py:function` with the file's absolute path; `package.module:function` unchanged."""
    file, colon, function = name.rpartition(":")
    return f"{_absolute(file)}:{function}" if colon and file.endswith(".py") else name


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse_in_job(storage: str) -> None:
    # The job manager sets this variable for the entry point only; the job's folder is deleted with the job.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(
            "R109",
            f"storage: given {storage!r}, which inside a Ray job lies in a temporary folder and would be lost",
            "give an absolute path that all nodes see, or a bucket: storage=/shared/runs or storage=s3://bucket/runs",
        )
