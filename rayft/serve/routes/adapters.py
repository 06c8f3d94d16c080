"""Routes about adapters: which there are, loading and removing them, who answers, and how that goes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import PlainTextResponse

from rayft.errors import UsageError
from rayft.runs.registry import Alias, Version
from rayft.serve.backend import ReplicaState
from rayft.serve.lifecycle import Lifecycle, Terms

STATUS = {
    "R410": 404,
    "R413": 404,
    "R414": 404,
    "R421": 404,
    "R423": 404,
    "R424": 409,
    "R428": 409,
    "R429": 409,
    "R432": 404,
    "R433": 404,
    "R434": 403,
    "R435": 404,
}
"""HTTP statuses of errors that these routes meet, where they are not 400."""
_NAME = Field(min_length=1, max_length=200)
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class NewAdapter(_Body):
    """An adapter that is to be loaded, or a version that is to answer."""

    name: str = _NAME
    source: str | None = Field(None, min_length=1, max_length=4000)
    """`run:NAME[@...]`, a folder, a bucket or `hf://OWNER/NAME`."""
    version: int | None = None
    """Instead of `source`: one that the name has already."""
    promote: bool | None = None
    """Whether it gets every request; by default where nothing is served under this name yet."""
    weight: float | None = Field(None, gt=0, le=1)
    """Share of the requests that it gets; the others keep their proportions."""
    pin: bool | None = None
    strength: float | None = None
    note: str = Field("", max_length=1000)

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if (self.source is None) == (self.version is None):
            raise ValueError("give either source or version")
        if self.promote and self.weight is not None:
            raise ValueError("give either promote or weight: a promoted version gets every request")
        return self


class Promotion(_Body):
    version: int


class Weights(_Body):
    weights: dict[int, float] = Field(min_length=1)
    """By version number, in any unit; versions that are not named get no requests."""


class Pin(_Body):
    pinned: bool = True


class Feedback(_Body):
    id: str = Field(min_length=1, max_length=200)
    """Of the answer."""
    score: float
    """On any scale on which more is better."""


class VllmLoad(BaseModel):
    """As vLLM's clients send it; fields that mean nothing here are passed over."""

    lora_name: str = _NAME
    lora_path: str = Field(min_length=1, max_length=4000)
    load_inplace: bool = False


class VllmUnload(BaseModel):
    lora_name: str = _NAME


def router(
    lifecycle: Lifecycle,
    admin: Callable[..., Any],
    reader: Callable[..., Any] | None = None,
) -> APIRouter:
    """admin: a dependency that lets only those in who may change adapters, and returns their name or None. reader: the
    same for looking at them; ``admin`` by default."""
    routes = APIRouter(prefix="/v1", tags=["adapters"])
    registry, backend, experiments = lifecycle.registry, lifecycle.backend, lifecycle.experiments
    changes, looks = Depends(admin), Depends(reader or admin)

    async def shown(alias: Alias) -> dict[str, Any]:
        return described(alias, await backend.states())

    @routes.get("/adapters")
    async def adapters(who: Any = looks) -> dict[str, Any]:
        """All names with their versions."""
        states = await backend.states()
        return {"object": "list", "data": [described(alias, states) for alias in registry.aliases().values()]}

    @routes.get("/adapters/{name:path}/experiment")
    async def experiment(name: str, who: Any = looks) -> dict[str, Any]:
        """How the versions of a name do beside each other, as this process saw it."""
        alias = registry.alias(name)
        report = await asyncio.to_thread(experiments.report, name, alias.weights)  # a million differences
        return {"object": "experiment", **asdict(report)}

    @routes.get("/adapters/{name:path}")
    async def adapter(name: str, who: Any = looks) -> dict[str, Any]:
        """One name, with its history."""
        alias = registry.alias(name)
        return {**await shown(alias), "history": [asdict(event) for event in alias.history]}

    @routes.post("/adapters")
    async def add(asked: NewAdapter, who: Any = changes) -> dict[str, Any]:
        """Load an adapter on every replica; then it answers, alone, with a share, or not yet."""
        terms = Terms(asked.promote, asked.weight, asked.pin, asked.strength)
        if asked.source is not None:
            alias, _ = await lifecycle.add(asked.name, asked.source, terms, note=asked.note, who=who)
        else:
            assert asked.version is not None
            alias = await lifecycle.serve(asked.name, asked.version, terms, who)
        return await shown(alias)

    @routes.post("/adapters/{name:path}/promote")
    async def promote(name: str, asked: Promotion, who: Any = changes) -> dict[str, Any]:
        """Put a version into production: it gets every request."""
        return await shown(await lifecycle.promote(name, asked.version, who))

    @routes.post("/adapters/{name:path}/rollback")
    async def rollback(name: str, who: Any = changes) -> dict[str, Any]:
        """Take back the last promotion or change of weights."""
        return await shown(await lifecycle.rollback(name, who))

    @routes.post("/adapters/{name:path}/weights")
    async def weights(name: str, asked: Weights, who: Any = changes) -> dict[str, Any]:
        """Split the requests among versions."""
        return await shown(await lifecycle.weigh(name, asked.weights, who))

    @routes.post("/adapters/{name:path}/pin")
    async def pin(name: str, asked: Pin, who: Any = changes) -> dict[str, Any]:
        """Keep an adapter on every device, or no longer."""
        return await shown(await lifecycle.pin(name, asked.pinned, who))

    @routes.delete("/adapters/{name:path}")
    async def remove(name: str, version: int | None = None, who: Any = changes) -> dict[str, Any]:
        """Forget a name, or one version that gets no requests; requests in flight end on it."""
        await lifecycle.remove(name, version, who)
        return {"object": "adapter", "name": name, "version": version, "deleted": True}

    @routes.post("/feedback")
    async def feedback(asked: Feedback, who: Any = changes) -> dict[str, Any]:
        """Note what a user thinks of an answer."""
        name, version = experiments.feedback(asked.id, asked.score)
        return {"object": "feedback", "id": asked.id, "name": name, "version": version}

    @routes.post("/load_lora_adapter", responses=_TEXT)
    async def load_lora_adapter(asked: VllmLoad, who: Any = changes) -> PlainTextResponse:
        """As vLLM's route of this name; `load_inplace` puts the adapter in the place of the one with its name."""
        if asked.lora_name in registry.aliases() and not asked.load_inplace:
            raise UsageError("R424", f"the adapter {asked.lora_name!r} is loaded already", "set load_inplace")
        await lifecycle.add(asked.lora_name, asked.lora_path, Terms(promote=True), allow_same=True, who=who)
        return PlainTextResponse(f"Success: adapter '{asked.lora_name}' is loaded.")

    @routes.post("/unload_lora_adapter", responses=_TEXT)
    async def unload_lora_adapter(asked: VllmUnload, who: Any = changes) -> PlainTextResponse:
        """As vLLM's route of this name."""
        await lifecycle.remove(asked.lora_name, None, who)
        return PlainTextResponse(f"Success: adapter '{asked.lora_name}' is unloaded.")

    return routes


def described(alias: Alias, states: Sequence[ReplicaState] = ()) -> dict[str, Any]:
    """An alias as JSON."""
    production = alias.production
    return {
        "object": "adapter",
        "name": alias.name,
        "production": production.number if production else None,
        "weights": {str(number): share for number, share in alias.weights.items()},
        "pinned": alias.pinned,
        "strength": alias.strength,
        "versions": [_version(version, alias.weights, states) for version in alias.versions],
    }


def _version(version: Version, weights: Mapping[int, float], states: Sequence[ReplicaState]) -> dict[str, Any]:
    facts = asdict(version)
    del facts["path"]  # of the registry's copy, which is nobody's business
    return {
        **facts,
        "weight": weights.get(version.number, 0.0),
        "loaded": sum(version.hash in state.loaded for state in states),
        "cached": sum(version.hash in state.cached for state in states),
    }
