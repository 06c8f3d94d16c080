"""Data that is pinned to nodes: who reads what where. The driver learns how many examples there are, and no more.

A site is a place (custom resources, labels of nodes) with the clients whose sources lie there. One worker of a
federation is at each site; a client's examples are rendered into that node's own cache and never leave it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rayft.config.data import Source
from rayft.config.federate import Federate, Pin
from rayft.config.recipe import Recipe
from rayft.data.sources import source_names
from rayft.errors import UsageError
from rayft.federate.partition import check_sizes, natural_order
from rayft.federate.preflight import Room, refuse, room_for
from rayft.runtime.cluster import Cluster, Resources, describe
from rayft.train.preparation import Preparation, prepare

if TYPE_CHECKING:
    from rayft.federate.heterogeneity import Heterogeneity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """A place and its clients. One without a pin is anywhere: its sources are where all nodes see them."""

    sources: Mapping[int, Source]
    """Client -> its source, whose name is unique."""
    pin: Pin | None = None

    def resources(self, worker: Resources) -> dict[str, float]:
        """What a worker takes there: a worker's own resources, and those of the pin."""
        return {**worker, **(self.pin.resources if self.pin else {})}

    @property
    def label_selector(self) -> dict[str, str]:
        return dict(self.pin.label_selector) if self.pin else {}

    def __str__(self) -> str:
        if self.pin is None:
            return "anywhere"
        labels = ", ".join(f"{name}: {text}" for name, text in self.pin.label_selector.items())
        asked = ", ".join(f"{amount:g} {name}" for name, amount in self.pin.resources.items())
        return " and ".join(part for part in (asked, labels and f"the label {labels}") if part)


@dataclass(frozen=True)
class Sites:
    """All sites of a federation, and what they have told."""

    names: tuple[str, ...]
    """Of the clients."""
    all: tuple[Site, ...]
    sizes: tuple[int, ...] = ()
    """Training examples of each client."""

    @property
    def of_clients(self) -> tuple[int, ...]:
        """Client -> number of its site."""
        found = {client: number for number, site in enumerate(self.all) for client in site.sources}
        return tuple(found[client] for client in range(len(self.names)))

    def hash(self, validation: str) -> str:
        """What the driver can know the data by: numbers of examples, and the hash of the validation data."""
        told = json.dumps([self.names, self.sizes, validation])
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def counts(self) -> Heterogeneity:
        """For `clients.json`: each source is a client and a class of its own."""
        import numpy as np

        from rayft.federate.heterogeneity import Heterogeneity

        return Heterogeneity(self.names, self.names, np.diag(np.array(self.sizes, dtype=np.int64)))


def sites_of(recipe: Recipe, federate: Federate) -> Sites:
    """Who is where. Clients have the numbers that `partition.method: sources` gives them.

    Raises UsageError R902 for a pin of a source that the recipe does not have.
    """
    by_name = dict(zip(source_names(recipe.data.train), recipe.data.train, strict=True))
    names = natural_order(list(by_name))
    pinned = {name: pin for pin in federate.pinned for name in pin.sources}
    if unknown := sorted(pinned.keys() - by_name.keys()):
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise UsageError(
            "R902",
            f"this recipe cannot be federated: federate.pinned names {unknown[0]!r}, and data.train has no such source",
            f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:8])}",
        )

    def those(pin: Pin | None) -> dict[int, Source]:
        return {
            number: by_name[name].model_copy(update={"name": name})
            for number, name in enumerate(names)
            if pinned.get(name) is pin
        }

    found = [Site(those(pin), pin) for pin in (*federate.pinned, None)]
    return Sites(tuple(names), tuple(site for site in found if site.sources))


def check_sites(sites: Sequence[Site], worker: Resources, cluster: Cluster) -> None:
    """Raises UsageError R906 when a site has no living node, or all sites' workers do not fit at once.

    Nodes that an autoscaler might add do not count: data does not come with them.
    """
    left = {node.id: dict(node.total) for node in cluster.nodes}
    able = {
        number: [n for n in cluster.nodes if n.has(site.label_selector) and n.room(site.resources(worker))]
        for number, site in enumerate(sites)
    }
    for number in sorted(able, key=lambda number: len(able[number])):
        site = sites[number]
        if not able[number]:
            raise _nowhere(site, worker, cluster)
        need = site.resources(worker)
        fits = [n for n in able[number] if all(left[n.id].get(k, 0) >= amount for k, amount in need.items())]
        if not fits:
            raise UsageError(
                "R906",
                f"the workers of all {len(sites)} places of federate.pinned do not fit at once: nothing is left for "
                f"{site}, where one worker needs {describe(need)}",
                "one pin for sources of the same node, a lower scale.cpus_per_worker, or a larger node",
            )
        for name, amount in need.items():
            left[fits[0].id][name] -= amount
    busy = [site for n, site in enumerate(sites) if not any(a.free_room(site.resources(worker)) for a in able[n])]
    if busy:
        logger.warning("%s is busy: the federation begins when others have ended", busy[0])


def _nowhere(site: Site, worker: Resources, cluster: Cluster) -> UsageError:
    there = [f"{node.host} ({describe(node.total)}{_labels(node.labels)})" for node in cluster.nodes[:6]]
    return UsageError(
        "R906",
        f"no node is {site} with {describe(worker)} for a worker, where federate.pinned has "
        f"{', '.join(source.name or '' for source in site.sources.values())}; the nodes: {', '.join(there)}",
        "start that node (ray start --resources or --labels), or change the pin",
    )


def _labels(labels: Mapping[str, str]) -> str:
    own = [f"{name}: {value}" for name, value in labels.items() if not name.startswith("ray.io/")]
    return f"; {', '.join(own)}" if own else ""


# Before round 1


def settle_sites(recipe: Recipe, federate: Federate) -> tuple[Preparation, Sites]:
    """As `preparation.prepare`, with only what is no client's: base, number format, validation data. Each site renders
    its clients' examples and tells their numbers.

    Raises UsageError R906 before anything waits for a place, R905 where a block does not fit, R201 and others where a
    source cannot be read.
    """
    sites = sites_of(recipe, federate)
    prepared = prepare(without_sources(recipe))
    decided = recipe.model_copy(update={"model": prepared.recipe.model})
    assert prepared.placement is not None
    from rayft.runtime.cluster import snapshot

    worker = prepared.placement.resources
    check_sites(sites.all, worker, snapshot())
    surveys = _everywhere(sites.all, worker, decided, prepared)
    sizes: dict[int, int] = {}
    for survey in surveys:
        sizes |= survey.sizes
        refuse(survey.room, federate.pack_size, 1, prepared.device)
    sites = replace(sites, sizes=tuple(sizes[client] for client in range(len(sites.names))))
    check_sizes(dict(zip(sites.names, sites.sizes, strict=True)), federate.partition)
    return replace(prepared, recipe=decided), sites


def without_sources(recipe: Recipe) -> Recipe:
    """The recipe with its validation sources as its only data; perhaps with none."""
    validation = recipe.data.validation if isinstance(recipe.data.validation, list) else []
    data = recipe.data.model_copy(update={"train": validation, "validation": None})
    return recipe.model_copy(update={"data": data})


@dataclass(frozen=True)
class Survey:
    """All that a site tells before round 1."""

    sizes: dict[int, int] = field(default_factory=dict)
    """Client -> training examples."""
    room: Room = field(default_factory=lambda: Room(0.0, 0, 0))
    """For the client with the longest example."""


def _everywhere(sites: Sequence[Site], worker: Resources, recipe: Recipe, prepared: Preparation) -> list[Survey]:
    """A survey of each site, in a task that runs there."""
    import ray

    data = recipe.model_dump(mode="json")
    tasks = []
    for site in sites:
        resources = site.resources(worker)
        there = ray.remote(survey).options(
            num_cpus=resources.pop("CPU", 1),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            label_selector=site.label_selector,
            max_retries=1,
        )
        sources = {client: source.model_dump(mode="json") for client, source in site.sources.items()}
        tasks.append(there.remote(data, prepared.base, sources, prepared.device))
    try:
        found: list[Survey] = ray.get(tasks)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    return found


def survey(recipe_data: dict[str, Any], base: str, sources: Mapping[int, dict[str, Any]], device: str) -> Survey:
    """On a node of the site: render its clients' examples into the node's cache, and count them."""
    from rayft.federate.data import Pinned
    from rayft.models import hub, load
    from rayft.train.worker import quiet

    quiet()
    recipe = Recipe.model_validate(recipe_data)
    folder = hub.fetch(base, recipe.model.revision)
    holdings = Pinned(recipe, load.load_tokenizer(recipe, folder), sources)
    sizes, rooms = {}, []
    for client in sources:
        data, indices = holdings.of(client)
        examples = data.split("train")
        assert examples is not None
        sizes[client] = len(indices)
        rooms.append(room_for(recipe, base, examples, device, 1))
    return Survey(sizes, max(rooms, key=lambda room: room.base))
