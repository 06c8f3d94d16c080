"""The rounds of a federation, from the first to the last, whoever trains the clients and wherever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rayft.config.federate import Federate
from rayft.errors import RunStopped, UsageError
from rayft.federate import aggregate, evaluation, wire
from rayft.federate.asynchronous import Flight
from rayft.federate.books import Book, Books, stripped
from rayft.federate.messages import Server
from rayft.federate.noise import Noise
from rayft.federate.pool import Pool
from rayft.federate.privacy import Ledger, expected, noise_multiplier
from rayft.federate.round import Gathered, Interrupted, check, gather
from rayft.federate.sample import asked, cohort
from rayft.federate.state import rounded
from rayft.federate.task import Opening, Task

STATEFUL_METHODS = ("fedsa",)
Export = Callable[[Opening, Server, Path], None]
"""Writes the adapter that a server deploys into a folder."""


@dataclass(frozen=True)
class Plan:
    """What a federation needs beside its settings."""

    name: str
    population: int
    seed: int
    learning_rate: float
    retries: int = 3
    """How often a block may lose its worker; -1 = any number."""
    save_total_limit: int | None = 3
    sites: tuple[int, ...] = ()
    """Client -> where its data is pinned; empty: all clients are anywhere."""


class Federation:
    """Drives a pool of workers round by round and keeps the books. `run` may be called again after a stop."""

    def __init__(
        self,
        federate: Federate,
        plan: Plan,
        pool: Pool,
        books: Books,
        *,
        export: Export,
        told: Callable[[dict[str, Any]], None] = lambda row: None,
        event: Callable[..., None] = lambda kind, **facts: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """told: hears of each round's row of metrics. event: writes a line of events.jsonl."""
        self.federate, self.plan, self.pool, self.books = federate, plan, pool, books
        self.export, self.told, self.event, self.stopping = export, told, event, stopping
        self.opening = Opening({}, aggregate.Alphas(1.0))
        self._flight = Flight(pool, federate, plan.population, plan.seed)
        self.ledger: Ledger | None = None
        if federate.privacy is not None:
            self.ledger = Ledger(federate.privacy, plan.population, books.releases())

    def run(self) -> tuple[Book, str]:
        """(the last round, why there is no further one: rounds, privacy or communication).

        Raises RunStopped R940 when it was asked to stop, RunFailed R920 or R921 when a round does not count, UsageError
        R903 when not even the first round fits a budget, R911.
        """
        if self.federate.privacy is not None:
            noise_multiplier(self.federate, self.plan.population)
        book = self.books.last()
        self.opening = self._call("open")
        if book is None:
            clip = self.federate.privacy.clip if self.federate.privacy else None
            book = Book(Server(self.opening.state, clip=clip), settings=self.federate.model_dump(mode="json"))
        self.books.mend(book)
        while book.server.rounds < self.federate.rounds:
            if spent := self._spent(book):
                if book.server.rounds == 0:
                    raise UsageError("R903", f"not one round fits the budget of federate.{spent}", "raise it")
                return book, "privacy" if spent.startswith("privacy") else "communication"
            try:
                book = self._round(book)
            except Interrupted:
                raise RunStopped(
                    "R940",
                    f"run {self.plan.name!r} was stopped after round {book.server.rounds}, which is saved",
                    "--resume goes on",
                ) from None
        return book, "rounds"

    # One round

    def _round(self, book: Book) -> Book:
        began = time.monotonic()
        federate, plan, server = self.federate, self.plan, book.server
        number = server.rounds + 1
        if self.stopping():
            raise Interrupted
        setting = self._setting(number)
        task = Task(setting, self._message(server), self.learning_rate(number))
        kept = dict(book.kept)
        if federate.strategy == "fedbuff":
            arrivals, found = self._flight.collect(task, book.kept, self.stopping)
            clients = [arrival.client for arrival in arrivals]
            self._log(number, found)
            changes = [(arrival.change, number - arrival.number) for arrival in arrivals]
            after, metrics = aggregate.buffered(federate, server, changes)
            if self._keeps_states:
                kept |= {arrival.client: arrival.number for arrival in arrivals}
        else:
            clients = cohort(federate, plan.population, plan.seed, number)
            found = self._gathered(task, clients, book)
            after, metrics = aggregate.finish(setting, server, found.total, self._released(number))
            if self._keeps_states:
                kept |= dict.fromkeys(found.total.clients, number)
        row = self._row(number, found, clients, server, metrics, book) | {"learning_rate": task.learning_rate}
        row |= self._evaluated(after, kept, number)
        row["seconds"] = round(time.monotonic() - began, 3)
        best = book.best
        score = evaluation.score(row)
        if score is not None and (best is None or score < best[1]):
            best = (number, score)
        new = replace(
            book,
            server=after,
            kept=kept,
            row=row,
            best=best,
            tokens=int(row["tokens"]),
            megabytes=row["mb_total"],
            settings=federate.model_dump(mode="json"),
        )
        self.books.commit(new, lambda folder: self.export(self.opening, after, folder))
        self.books.forget(book.kept, kept)
        self.books.thin(plan.save_total_limit, best[0] if best else None)
        self.told(row)
        return new

    def _gathered(self, task: Task, clients: list[int], book: Book) -> Gathered:
        """The answers of a cohort; raises where they make no round."""
        cohort, number = self.federate.cohort, task.setting.number
        found = gather(
            self.pool,
            task,
            clients,
            book.kept,
            enough=self._enough(clients),
            retries=self.plan.retries,
            sites=self.plan.sites,
            deadline=cohort.deadline_s,
            stopping=self.stopping,
        )
        self._log(number, found)
        check(found, clients, cohort.minimum, cohort.max_failed, number)
        return found

    def _released(self, number: int) -> Noise | None:
        """The noise of a round. Its release is in the ledger before it is in the world: a kill between the two costs
        budget and never gives it back."""
        if self.ledger is None:
            return None
        release = self.ledger.event(self.federate, number)
        self.books.release(release)
        self.ledger.releases.append(release)
        return Noise(self.ledger.privacy.noise_seed, number)

    def _setting(self, number: int) -> aggregate.Setting:
        plan = self.plan
        return aggregate.Setting(
            self.federate, number, self.opening.alphas, plan.population, plan.seed, tuple(self.federate.ranks)
        )

    def _message(self, server: Server) -> Server:
        """The server as its clients see it: in the wire's number format, without what is not for them."""
        if self.federate.wire == "bf16":
            server = replace(server, state=rounded(server.state, torch.bfloat16))
        return stripped(server)

    def learning_rate(self, number: int) -> float:
        """Of a round: constant, or from the recipe's in the first round to `min_learning_rate` in the last one."""
        high, low = self.plan.learning_rate, self.federate.min_learning_rate
        if self.federate.lr_schedule == "constant" or self.federate.rounds == 1:
            return high
        share = (number - 1) / (self.federate.rounds - 1)
        if self.federate.lr_schedule == "linear":
            return high + (low - high) * share
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))

    def _enough(self, clients: list[int]) -> int:
        """With over-selection the round ends when as many have answered as were wanted."""
        if self.federate.cohort.over_selection:
            return int(expected(self.federate, self.plan.population))
        return len(clients) + 1

    @property
    def _keeps_states(self) -> bool:
        f = self.federate
        return f.method in STATEFUL_METHODS or f.strategy == "scaffold" or f.optimizer_state == "keep"

    # Budgets

    def _spent(self, book: Book) -> str:
        """Which budget the next round would exceed."""
        federate = self.federate
        number = book.server.rounds + 1
        if self.ledger is not None and not self.ledger.allows(self.ledger.event(federate, number)):
            return "privacy.epsilon"
        limit = federate.communication_budget_mb
        if limit is not None:
            clients = asked(federate, self.plan.population)
            if book.megabytes + clients * (self._down(book.server, 0) + self._up(book.server, number)) / 1e6 > limit:
                return "communication_budget_mb"
        return ""

    def _down(self, server: Server, client: int) -> float:
        return wire.down(self.federate, server, self.opening.alphas, self._setting(1).rank_of(client))

    def _up(self, server: Server, number: int) -> float:
        return wire.up(self.federate, server, number)

    # What is told

    def _row(
        self, number: int, found: Gathered, clients: list[int], server: Server, metrics: dict[str, float], book: Book
    ) -> dict[str, Any]:
        facts, total = found.total.facts, found.total
        down = sum(self._down(server, client) for client in clients) / 1e6
        up = facts.get("bytes_up", 0.0) / 1e6
        row: dict[str, Any] = {
            "step": number,
            "round": number,
            "tokens": book.tokens + int(facts.get("tokens", 0.0)),
            "cohort": len(clients),
            "clients": len(total.clients),
            "failed": len(total.failed),
            "late": len(found.late),
            "mb_down": round(down, 6),
            "mb_up": round(up, 6),
            "mb_total": book.megabytes + down + up,
            "base_loads": self.pool.started,
            "worker_memory_gb": round(found.peak_memory / 1e9, 3),
        }
        if facts.get("loss_weight"):
            row["loss"] = facts["loss"] / facts["loss_weight"]
        if self.ledger is not None:
            row["epsilon"] = self.ledger.epsilon()
        return row | metrics

    def _log(self, number: int, found: Gathered) -> None:
        for client, reason in found.total.failed:
            self.event("client_failed", round=number, client=client, reason=reason)
        for sentence in found.lost:
            self.event("worker_died", round=number, reason=sentence)
        if found.late:
            self.event("late", round=number, clients=found.late)

    # Evaluation

    def _evaluated(self, server: Server, kept: dict[int, int], number: int) -> dict[str, float]:
        how = self.federate.evaluate
        if number % how.every and number != self.federate.rounds:
            return {}
        task = Task(self._setting(number), self._message(server), self.learning_rate(number))
        row: dict[str, float] = {}
        shared = self.federate.method != "fedsa"  # which has no adapter for everybody
        if how.central and shared and (loss := self._call("central", task)) is not None:
            row["validation_loss"] = loss
        if how.holdout:
            clients = evaluation.chosen(self.federate, self.plan.population, self.plan.seed, number)
            size, plan = self.federate.pack_size, self.plan
            losses = evaluation.measure(self.pool, task, clients, kept, size, plan.retries, plan.sites)
            row |= evaluation.summary(losses)
            self.event("evaluation", round=number, losses={one.client: one.loss for one in losses})
        return row

    def _call(self, method: str, *arguments: Any) -> Any:
        """One call to any worker; another one takes it when that dies."""
        return evaluation.call(self.pool, method, *arguments, retries=self.plan.retries)
