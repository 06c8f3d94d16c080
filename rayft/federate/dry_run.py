"""`rayft federate --dry-run`: what a federation would do, without a cluster, without training and without a run."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayft import config
from rayft.config.federate import REPLACED, Federate
from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.federate.check import check, trains_alone
from rayft.federate.driver import with_section
from rayft.train.dry_run import DryRun, prepare_here

if TYPE_CHECKING:
    from rayft.train.preparation import Preparation

SHOWN = 20
"""Clients that are listed for people; `--json` has all."""


@dataclass(frozen=True)
class FederateDryRun:
    """`run`: recipe, the plan of the rounds, memory of one worker. `clients`: name -> training examples, before
    `evaluate.holdout`; None with `pinned`, whose nodes are not asked. Both are empty where `run.missing` says why."""

    run: DryRun
    clients: dict[str, int | None] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    """How much clients differ, as in the report."""

    def to_json(self) -> dict[str, Any]:
        return {**self.run.to_json(), "clients": self.clients, "heterogeneity": self.spread}

    def to_rich(self) -> RenderableType:
        if not self.clients:
            return self.run.to_rich()
        table = Table("client", "examples", title="Clients", title_justify="left", box=None)
        for name, size in list(self.clients.items())[:SHOWN]:
            table.add_row(Text(name), "on its node" if size is None else f"{size:,}")
        if len(self.clients) > SHOWN:
            table.add_row(f"and {len(self.clients) - SHOWN} more", "")
        spread = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.spread.items())
        return Group(self.run.to_rich(), Text(), table, Text(spread))


def dry_run(
    source: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Sequence[str] = ()
) -> FederateDryRun:
    """Check the recipe and, where the base is on this machine already, render the data and split it over the clients.

    Workers are the recipe's number; `auto` is planned as one, since no cluster is asked. Raises UsageError as `run`
    would before its first round; R905 only for `scale.workers: 0`, whose memory is this machine's.
    """
    resolved = config.load(source, overrides)
    values = [(key, value, str(origin)) for key, value, origin in resolved.dry()]
    recipe, federate = with_section(resolved.recipe)
    check(recipe, federate)
    if federate.pinned:
        from rayft.federate.sites import sites_of, without_sources

        sites = sites_of(recipe, federate)
        prepared = prepare_here(without_sources(recipe))
        if isinstance(prepared, str):
            return FederateDryRun(DryRun(values, missing=prepared))
        plan = _plan(replace(prepared, workers=len(sites.all)), federate, len(sites.names))
        return FederateDryRun(DryRun(values, plan), dict.fromkeys(sites.names))
    prepared = prepare_here(recipe)
    if isinstance(prepared, str):
        return FederateDryRun(DryRun(values, missing=prepared))

    from rayft.federate import preflight
    from rayft.federate.data import shares_of
    from rayft.federate.sample import blocks_of

    parts, found = shares_of(recipe, prepared.data)
    count = max(1, min(prepared.workers, blocks_of(federate, len(parts))))
    prepared = replace(prepared, workers=count)
    plan = _plan(prepared, federate, len(parts))
    settled = prepared.settled
    room = preflight.measure(
        recipe.model_dump(mode="json"),
        prepared.base,
        settled.data_folder,
        settled.data_hash,
        prepared.device,
        count,
    )
    if recipe.scale.workers == 0:
        preflight.refuse(room, federate.pack_size, count, prepared.device)
    memory = {
        "base_with_one_client": room.base,
        "each_further_client_of_a_block": room.client,
        "block": room.base + (federate.pack_size - 1) * room.client,
        "free_here": round(room.free),
    }
    sizes: dict[str, int | None] = {name: len(indices) for name, indices in parts.items()}
    return FederateDryRun(DryRun(values, plan, memory), sizes, found.summary())


def _plan(prepared: Preparation, federate: Federate, population: int) -> dict[str, Any]:
    from rayft.federate.sample import asked, blocks_of

    plan: dict[str, Any] = {
        "clients": population,
        "cohort": _plain(asked(federate, population)),
        "sampling": federate.cohort.sampling,
        "rounds": federate.rounds,
        "local": f"{federate.local_steps} steps" if federate.local_steps else f"{federate.local_epochs or 1:g} epochs",
        "strategy": federate.strategy,
        "aggregation": federate.method,
        "clients_at_once": f"1 ({alone})" if (alone := trains_alone(prepared.recipe)) else federate.pack_size,
        "workers": prepared.workers,
        "dtype": prepared.settled.dtype,
        "device": prepared.device,
    }
    if not federate.pinned:
        stats = prepared.data.stats
        counts = {"examples": stats["train"], "validation_examples": stats.get("validation", {})}
        plan = {name: found.get("examples", 0) for name, found in counts.items()} | plan
        plan["blocks_per_round"] = blocks_of(federate, population)
    return plan | _messages(prepared, federate, population) | _privacy(federate, population)


def _messages(prepared: Preparation, federate: Federate, population: int) -> dict[str, Any]:
    """Megabytes of the first round, and how many rounds `communication_budget_mb` holds where they are all alike.

    Raises UsageError R903 when it holds none."""
    from rayft.federate import wire
    from rayft.federate.messages import Alphas, Server
    from rayft.federate.sample import asked
    from rayft.models import hub, memory

    recipe, clients = prepared.recipe, asked(federate, population)
    server = Server(memory.trained_tensors(recipe, hub.fetch(prepared.base, recipe.model.revision)))
    ranks: Sequence[int | None] = federate.ranks or (None,)
    of_one = [wire.down(federate, server, Alphas(1.0), ranks[n % len(ranks)]) for n in range(population)]
    down, up = clients * sum(of_one) / population, clients * wire.up(federate, server, 1)
    plan: dict[str, Any] = {"mb_down_first_round": round(down / 1e6, 3), "mb_up_first_round": round(up / 1e6, 3)}
    budget = federate.communication_budget_mb
    if budget is None:
        return plan
    first = clients * (wire.down(federate, server, Alphas(1.0), ranks[0]) + wire.up(federate, server, 1)) / 1e6
    if first > budget:
        raise UsageError("R903", "not one round fits the budget of federate.communication_budget_mb", "raise it")
    if federate.method not in REPLACED and federate.strategy != "scaffold":
        plan["rounds_in_communication_budget"] = min(federate.rounds, math.floor(budget / first))
    return plan


def _privacy(federate: Federate, population: int) -> dict[str, Any]:
    """What the run would have spent at its end. Raises UsageError R903 when the budget holds no round, R911."""
    if federate.privacy is None:
        return {}
    from rayft.federate.privacy import Ledger, noise_multiplier

    noise_multiplier(federate, population)
    ledger = Ledger(federate.privacy, population, [])
    events = [ledger.event(federate, number) for number in range(1, federate.rounds + 1)]
    rounds, budget = federate.rounds, federate.privacy.epsilon
    if budget is not None and ledger.epsilon(*events) > budget:
        rounds = bisect.bisect_right(range(1, federate.rounds + 1), budget, key=lambda n: ledger.epsilon(*events[:n]))
        if not rounds:
            raise UsageError("R903", "not one round fits the budget of federate.privacy.epsilon", "raise it")
    return {
        "rounds_in_privacy_budget": rounds,
        "epsilon_after_last_round": _plain(ledger.epsilon(*events[:rounds])),
        "delta": ledger.delta,
    }


def _plain(value: float) -> Any:
    """JSON knows no infinity."""
    if not math.isfinite(value):
        return "infinite: nothing is noised"
    return int(value) if value == int(value) else round(value, 4)
