"""`run`: one recipe in, one adapter out that many clients' data has taught."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft import config
from rayft.config.federate import Federate
from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved
from rayft.errors import RayftError
from rayft.federate.check import check, trains_alone
from rayft.runs.folder import Mode, RunFolder
from rayft.runs.storage import check_writable, locate
from rayft.runtime.stopping import stoppable

if TYPE_CHECKING:
    from rich.console import Console

    from rayft.federate.books import Book
    from rayft.federate.pool import Pool
    from rayft.federate.sites import Sites
    from rayft.train.preparation import Preparation


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FederateResult:
    """A finished federation. ``metrics``: the best round's row of metrics.jsonl."""

    path: str
    name: str
    best: int
    """Number of the best round, whose adapter is the run's result."""
    rounds: int
    """Rounds done."""
    ended: str
    """Why there is no further one: rounds, privacy or communication."""
    metrics: Mapping[str, Any]
    state: str = "finished"
    kind: str = "adapter"
    """adapter, or model where the weights themselves were trained."""

    @property
    def folder(self) -> str:
        """The best round's adapter, for stock PEFT, or its model, for stock transformers."""
        return str(locate(self.path) / self.kind)

    @property
    def report(self) -> str:
        return str(locate(self.path) / "report.md")


def run(
    source: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Sequence[str] = (),
    *,
    mode: Mode = "fail",
    console: Console | None = None,
    quiet: bool = False,
) -> FederateResult:
    """Federate what a recipe says and leave a run whose result is the best round's adapter.

    source: YAML file, run folder, plain data or Recipe; overrides: `section.key=value`. mode: what to do when the run's
    name is in use (fail, resume, overwrite, new). Raises UsageError before anything starts when the user can fix it,
    RunFailed when a round does not count, and RunStopped when it was asked to stop.
    """
    resolved = config.load(source, overrides)
    recipe, federate = with_section(resolved.recipe)
    check(recipe, federate)
    if recipe.adapter is not None and (reason := trains_alone(recipe)):
        logger.warning("clients train one at a time, and tensors are averaged one by one (fedit): %s", reason)
    check_writable(locate(recipe.storage))
    if mode == "resume":
        _check_former(resolved, federate)
    folder = RunFolder.taken_up(resolved, "federate", mode)
    if folder is not None and folder.state == "finished":
        folder.release()
        return result_of(folder)

    from rayft.train.preparation import prepare

    sites: Sites | None = None
    try:
        if federate.pinned:
            from rayft.federate.sites import settle_sites

            prepared, sites = settle_sites(recipe, federate)
        else:
            prepared = prepare(recipe)
        folder = folder or RunFolder.create(resolved, "federate", mode)
    except BaseException:
        if folder is not None:
            folder.finish("stopped")  # nothing was lost: it can be resumed as before
        raise
    with folder:
        return _run(folder, prepared, federate, sites, console, quiet)


def with_section(recipe: Recipe) -> tuple[Recipe, Federate]:
    """The recipe with its section `federate`, which is that of the defaults where it is absent, and says how tensors
    are put together where clients train alone."""
    federate = recipe.federate or Federate()
    if federate.aggregation == "auto" and trains_alone(recipe):
        federate = federate.model_copy(update={"aggregation": "fedit"})  # there are no factors to put together
    return recipe.model_copy(update={"federate": federate}), federate


def _check_former(resolved: Resolved, federate: Federate) -> None:
    """Raises UsageError R930 where the run that is to go on was made with other settings."""
    from rayft.federate.books import check_same, read_book, rounds_of

    place = locate(resolved.recipe.storage) / resolved.recipe.name
    if not (place / "run.json").is_file():
        return
    former = RunFolder.open(place)
    if former.record.verb == "federate" and (found := rounds_of(former)):
        check_same(read_book(former, found[-1]), federate, former.name)


def _run(
    folder: RunFolder,
    prepared: Preparation,
    federate: Federate,
    sites: Sites | None,
    console: Console | None,
    quiet: bool,
) -> FederateResult:
    from rayft.federate.books import Books
    from rayft.federate.display import Display
    from rayft.federate.export import export, export_personal
    from rayft.federate.federation import Export, Federation, Plan

    recipe, settled = prepared.recipe, prepared.settled
    data_hash = settled.data_hash if sites is None else sites.hash(settled.data_hash)
    folder.pin(base=settled.base_hash, data=data_hash, template=settled.template_hash)
    names = _shares(folder, prepared) if sites is None else _counts(folder, sites)
    rate = recipe.train.learning_rate
    assert rate is not None
    plan = Plan(
        folder.name,
        len(names),
        recipe.seed,
        rate,
        recipe.scale.max_failures,
        recipe.train.save_total_limit,
        sites.of_clients if sites is not None else (),
    )
    asked = threading.Event()
    began, before = time.time(), float(folder.record.facts.get("seconds", 0.0))
    events = folder.events_log()
    display = Display(folder.name, federate, len(names), console, quiet=quiet)

    def event(kind: str, **facts: Any) -> None:
        events.append({"kind": kind, "time": round(time.time(), 3), **facts})
        display.event(kind, facts)

    pool = _pool(prepared, federate, folder, len(names), sites)
    books = Books(folder, kind_of(recipe))
    deploy: Export = export
    if trains_alone(recipe):
        from rayft.federate.alone import Exporter

        deploy = Exporter(recipe, prepared.base, prepared.init_adapter)
    try:
        with stoppable(asked.set), display:
            federation = Federation(
                federate,
                plan,
                pool,
                books,
                export=deploy,
                told=display.row,
                event=event,
                stopping=asked.is_set,
            )
            book, ended = federation.run()
        if federate.method == "fedsa":
            export_personal(folder, federation.opening, book.server, book.kept)
    except RayftError:
        folder.note(seconds=before + time.time() - began)
        _report(folder, federate, names)
        raise
    finally:
        events.flush()
        pool.close()
    folder.note(seconds=before + time.time() - began)
    return _finish(folder, book, ended, recipe, federate, names)


def kind_of(recipe: Recipe) -> str:
    """What a round deploys: adapter or model."""
    return "adapter" if recipe.adapter is not None else "model"


def _finish(
    folder: RunFolder, book: Book, ended: str, recipe: Recipe, federate: Federate, names: Sequence[str]
) -> FederateResult:
    from rayft.federate.books import ROUNDS, read_book
    from rayft.federate.export import rank_of

    best = book.best[0] if book.best else book.server.rounds
    kind = kind_of(recipe)
    with folder.writing(kind) as target:
        (folder.location / ROUNDS / str(best) / kind).copy_to(locate(target))
    chosen = read_book(folder, best)
    facts = {
        "kind": kind,
        "best_round": best,
        "rounds": book.server.rounds,
        "ended": ended,
        "rank": rank_of(chosen.server),
        "gap": chosen.row.get("gap"),
        "epsilon": _plain(book.row.get("epsilon")),
        "base_loads": book.row.get("base_loads"),
        "metrics": chosen.row,
    }
    folder.note(**facts)
    _report(folder, federate, names)
    folder.finish("finished")
    return result_of(folder)


def result_of(folder: RunFolder) -> FederateResult:
    """The result of a finished federation."""
    facts = folder.record.facts
    return FederateResult(
        folder.path,
        folder.name,
        facts["best_round"],
        facts["rounds"],
        facts["ended"],
        facts["metrics"],
        folder.state,
        facts["kind"],
    )


def _shares(folder: RunFolder, prepared: Preparation) -> list[str]:
    """The names of the clients. Who has which examples is decided once, where the data is, and kept in the run."""
    from rayft.federate.data import PARTITION, Shares
    from rayft.train.preparation import elsewhere

    path = str(folder.location / PARTITION)
    if not locate(path).is_file():
        settled, recipe = prepared.settled, prepared.recipe.model_dump(mode="json")
        found = elsewhere(prepared.placement, _split_there, recipe, settled.data_folder, settled.data_hash, path)
        folder.write_json("clients.json", found.plain())
    return list(Shares.read(path).names)


def _counts(folder: RunFolder, sites: Sites) -> list[str]:
    """The names of pinned clients. Only their numbers of examples are kept in the run."""
    folder.write_json("clients.json", sites.counts().plain())
    return list(sites.names)


def _split_there(recipe: dict[str, Any], folder: str, hash: str, path: str) -> Any:
    from rayft.federate.data import write_shares
    from rayft.train.preparation import data_here

    data = data_here(folder, hash)
    return write_shares(recipe, data.folder, data.hash, path)


def _pool(prepared: Preparation, federate: Federate, folder: RunFolder, population: int, sites: Sites | None) -> Pool:
    from rayft.federate import preflight
    from rayft.federate.data import PARTITION
    from rayft.federate.local import LocalJob
    from rayft.federate.pool import Actors, Here, Place
    from rayft.federate.sample import blocks_of

    placement = prepared.placement
    job = LocalJob(
        recipe=prepared.recipe.model_dump(mode="json"),
        run=folder.path,
        base=prepared.base,
        device=prepared.device,
        threads=placement.cpus_per_worker if placement is not None else max(1, (os.cpu_count() or 2) - 1),
        data_folder=prepared.settled.data_folder,
        data_hash=prepared.settled.data_hash,
        shares=str(folder.location / PARTITION),
        init_from=prepared.init_adapter,
    )
    count = max(1, min(placement.workers[0], blocks_of(federate, population))) if placement is not None else 1
    if sites is None:
        preflight.check(prepared, federate, count)
    if placement is None:
        return Here(job)
    from rayft.train.launch import worker_environment

    places = []
    for site in sites.all if sites is not None else ():
        sources = {client: source.model_dump(mode="json") for client, source in site.sources.items()}
        own = replace(job, pinned=sources)
        places.append(Place(own, site.resources(placement.resources), site.label_selector, str(site)))
    return Actors(job, count, placement.resources, worker_environment(prepared.recipe), places)


def _report(folder: RunFolder, federate: Federate, names: Sequence[str]) -> None:
    """Write report.md. What goes wrong there costs neither the adapter nor the error that ended the run."""
    from rayft.federate.report import save_report

    try:
        save_report(folder, federate, names)
    except Exception as error:
        logger.warning("report.md of run %r could not be written: %s: %s", folder.name, type(error).__name__, error)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
