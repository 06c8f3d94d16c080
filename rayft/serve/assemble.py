"""The whole HTTP side of a server: names from the registry, routes about adapters, and what is written down."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from rayft.runs.registry import Registry
from rayft.serve.app import build
from rayft.serve.backend import Backend
from rayft.serve.experiment import Experiments
from rayft.serve.keys import admin
from rayft.serve.lifecycle import Lifecycle
from rayft.serve.names import RegistryNames
from rayft.serve.plan import Plan
from rayft.serve.record import Record
from rayft.serve.roots import Roots
from rayft.serve.routes import adapters


def assemble(plan: Plan, backend: Backend) -> FastAPI:
    """An application for this plan. Raises as `build` does, and UsageError R405 for a registry in a bucket."""
    registry, experiments = Registry(plan.registry), Experiments()
    roots = Roots(plan.recipe.serve.roots, plan.recipe.storage)
    lifecycle = Lifecycle(registry, backend, roots, experiments)
    return build(
        plan.recipe.serve,
        backend,
        RegistryNames(registry, plan.base_name),
        folder=plan.folder,
        routers=[adapters.router(lifecycle, admin)],
        observers=[observing(experiments)],
        meanwhile=[lifecycle.watch],
        statuses=adapters.STATUS,
    )


def observing(experiments: Experiments) -> Callable[[Record], None]:
    """Tells the experiments of requests that a version answered, or failed to; not of those that were refused or left,
    for which no version is to blame."""

    def observe(record: Record) -> None:
        ok = record.status == 200
        if record.version is not None and (ok or record.status in (408, 500)):
            experiments.observe(
                record.name, record.version, record.id, seconds=record.seconds, tokens=record.completion_tokens, ok=ok
            )

    return observe
