"""What a server serves: one base, and the adapters that it has from the start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.home import home
from rayft.models import hub
from rayft.models.identity import base_hash
from rayft.runs import reference
from rayft.runs.reference import AdapterRef
from rayft.runs.shelf import BASE
from rayft.runs.storage import locate
from rayft.runs.subject import Subject, subject

NO_DATA = "none"
"""Stands for `data.train`, which serving never reads."""


@dataclass(frozen=True)
class Plan:
    """Plain data: replicas get it as it is."""

    name: str
    """Of the server."""
    recipe: Recipe
    base: str
    """What `hub.fetch` turns into a folder on each machine."""
    base_name: str
    """As requests name the base."""
    base_hash: str
    adapters: Mapping[str, AdapterRef]
    """By the name that requests use."""
    sources: Mapping[str, str]
    """By the same name: what the user said."""
    registry: str
    """Folder of names and versions."""
    folder: str
    """Where the server keeps what it writes down: its address, numbers about requests."""
    attach: str | None = None
    """Address of a vLLM that runs already and answers instead of engines of this server."""


def plan(sources: Sequence[str | Path | Mapping[str, Any] | Recipe], overrides: Sequence[str] = ()) -> Plan:
    """Recipes, runs or folders that share a base; the first one's recipe says how to serve. No source: the overrides
    alone name the base.

    Raises:
        UsageError: R860 (another base), R861 (a full model beside others); R1xx, R3xx and R4xx of recipe, base and
            references.
    """
    words = [*overrides, *([] if sources else [f"data.train={NO_DATA}"])]
    found = [subject(source, words, data=NO_DATA) for source in (sources or [None])]  # type: ignore[list-item]
    full = [one for one in found if one.trained is not None and one.trained.kind == "model"]
    if full and len(found) > 1:
        raise UsageError(
            "R861",
            f"{full[0].name} holds whole weights, which are a base of their own",
            "serve it alone, or name adapters on it",
        )
    first = found[0]
    recipe = _placed(first.recipe)
    base, name = recipe.model.base, _name_of(recipe.model.base)
    if full:
        assert first.trained is not None
        base, name = first.trained.path, first.name
    elif base.startswith("run:"):
        base = reference.resolve(base, recipe.storage).path
    hash = base_hash(hub.fetch(base, recipe.model.revision))
    adapters: dict[str, AdapterRef] = {}
    said: dict[str, str] = {}
    for one in found:
        if one.trained is not None and one.trained.kind == "adapter":
            own = one.name if one.trained.run else one.trained.path.rstrip("/").rpartition("/")[2]
            adapters[own], said[own] = one.trained, f"run:{own}" if one.trained.run else one.trained.path
    for own, ref in recipe.serve.adapters.items():
        adapters[own], said[own] = reference.resolve(ref, recipe.storage), ref
    for own, trained in adapters.items():
        if _trained_on(trained) not in (None, hash):
            raise UsageError("R860", f"{own} was trained on other base weights than {name}, which is served")
    local = locate(recipe.storage)
    here = Path(recipe.storage).absolute() if local.is_local else home() / "servers"
    registry = recipe.serve.registry or str(here / "registry")
    server = _server_name(first, name)
    return Plan(server, recipe, base, name, hash, adapters, said, registry, str(here / "servers" / server))


def _placed(recipe: Recipe) -> Recipe:
    """With absolute paths: replicas and the HTTP side run in other folders, maybe of other machines."""
    places = {name: _absolute(place) for name in ("api_keys", "registry") if (place := getattr(recipe.serve, name))}
    serve = recipe.serve.model_copy(update={**places, "roots": [_absolute(root) for root in recipe.serve.roots]})
    return recipe.model_copy(update={"serve": serve, "storage": _absolute(recipe.storage)})


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def _trained_on(trained: AdapterRef) -> str | None:
    """Hash of the base, from its run, or from what lies beside an adapter that rayft saved."""
    beside = locate(trained.path) / BASE
    if trained.base_hash is None and beside.is_file():
        noted: str | None = json.loads(beside.read()).get("base_hash")
        return noted
    return trained.base_hash


def _server_name(first: Subject, base: str) -> str:
    return first.name if first.trained is not None else base.rpartition("/")[2].lower()


def _name_of(base: str) -> str:
    """A Hub id and an alias are names already; of a path the last part is one."""
    if hub.kind_of(base) in ("hub", "alias"):
        return base
    return base.rstrip("/").rpartition("/")[2].removesuffix(".gguf").removeprefix("run:")
