"""Data pinned to nodes: it is read where it lies and nowhere else, and that changes no number."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayft.config import load
from rayft.config.federate import Federate, Pin
from rayft.errors import UsageError
from rayft.federate import dry_run, pool, run
from rayft.federate.books import Books
from rayft.federate.export import export
from rayft.federate.federation import Federation, Plan
from rayft.federate.pool import Actors, Here, Place
from rayft.federate.sample import blocks
from rayft.federate.sites import Site, check_sites, sites_of
from rayft.runs.folder import RunFolder
from rayft.runtime.cluster import Cluster, Node
from tests.federate.test_rounds import numbers
from tests.federate.toy import ToyJob
from tests.train.conftest import Recipes, chat_rows, write_rows
from tests.train.test_chaos import wait_for

_spec = importlib.util.spec_from_file_location("local", Path(__file__).parents[2] / "cluster" / "local.py")
assert _spec is not None and _spec.loader is not None
local = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(local)


@contextmanager
def node(address: str, home: Path, *where: str) -> Iterator[Any]:
    """A node that joins the session's cluster, with RAYFT_HOME of its own; yields its process."""
    import ray

    def count() -> int:
        return sum(node["Alive"] for node in ray.nodes())

    home.mkdir()
    before, log = count(), home / "log"
    options = argparse.Namespace(cpus=1, object_store_mb=80)
    arguments = [f"--address={address}", *where, *local.node_arguments(options, local.free_ports(4))]
    process = local.start_node(arguments, {**os.environ, "RAYFT_HOME": str(home)}, log)
    try:
        wait_for(lambda: count() > before, 60, log)
        yield process
    finally:
        local.stop([process])
        wait_for(lambda: count() <= before, 60, log)


# Who is where, without a cluster


def pinned(recipe: Recipes, tmp_path: Path, pins: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    sources = []
    for number, name in enumerate("dcab"):
        rows = chat_rows(6 + number, seed=number)
        rows[0]["messages"][0]["content"] = f"rows of {name}"
        sources.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    federate = {"rounds": 2, "local_steps": 2, "pack_size": 1, "partition": {"method": "sources"}, "pinned": pins}
    federate |= {key: value for key, value in changes.items() if "." not in key}
    outer = {"data.train": sources, "train.max_steps": None, "scale.workers": "auto", "scale.cpus_per_worker": 1}
    return recipe(**outer | {key: value for key, value in changes.items() if "." in key}, federate=federate)


PINS = [
    {"sources": ["a.jsonl"], "resources": {"hospital_a": 1}},
    {"sources": ["b.jsonl", "d.jsonl"], "label_selector": {"hospital": "b"}},
]


def test_clients_have_the_numbers_of_their_sources(recipe: Recipes, tmp_path: Path) -> None:
    """In the order of names, as `sources` has them without pins; c is pinned nowhere."""
    found = load(pinned(recipe, tmp_path, PINS)).recipe
    assert found.federate is not None
    sites = sites_of(found, found.federate)
    assert sites.names == ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")
    assert [sorted(site.sources) for site in sites.all] == [[0], [1, 3], [2]]
    assert sites.of_clients == (0, 1, 2, 1)
    assert [str(site) for site in sites.all] == ["1 hospital_a", "the label hospital: b", "anywhere"]


def test_a_block_is_of_one_site() -> None:
    assert blocks([0, 1, 2, 3, 4, 5], 2, (0, 1, 0, 1, 0, 1)) == [[0, 2], [1, 3], [4], [5]]
    assert blocks([1, 2, 4], 2, (0, 1, 0, 1, 0, 1)) == [[1], [2, 4]]
    assert blocks([0, 2, 3], 2) == [[0, 2], [3]]


NODES = (
    Node("1", "one", {"CPU": 2, "hospital_a": 1}, {"CPU": 2, "hospital_a": 1}),
    Node("2", "two", {"CPU": 1}, {"CPU": 1}, {"hospital": "b"}),
)


def place(name: str, resources: dict[str, float], labels: dict[str, str] | None = None) -> Site:
    from rayft.config.data import Source

    pin = Pin(sources=[name], resources=resources, label_selector=labels or {})
    return Site({0: Source(path=name, name=name)}, pin)


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ("b", True),
        ("a", False),
        ("!a", True),
        ("!b", False),
        ("in(a, b)", True),
        ("in(a,c)", False),
        ("!in(a, c)", True),
        ("!in(a, b)", False),
    ],
)
def test_label_selectors_are_read_as_ray_reads_them(selector: str, fits: bool) -> None:
    assert NODES[1].has({"hospital": selector}) == fits
    assert NODES[0].has({"hospital": selector}) == selector.startswith("!"), "a node without the label"


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([place("x", {"hospital_c": 1})], r"no node is 1 hospital_c .* has x; .*two \(1 CPU; hospital: b\)"),
        ([place("x", {}, {"hospital": "c"})], "the label hospital: c"),
        ([place("x", {"hospital_a": 1}, {"hospital": "b"})], "1 hospital_a and the label hospital: b"),
        ([place("x", {}, {"hospital": "b"}), place("y", {}, {"hospital": "!a"})] * 2, "do not fit at once"),
        ([place("x", {"hospital_a": 1}), place("y", {"hospital_a": 1})], "do not fit at once"),
    ],
)
def test_a_place_that_is_not_there_is_refused(sites: list[Site], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_sites(sites, {"CPU": 1}, Cluster(NODES))
    assert caught.value.id == "R906"
    check_sites([place("x", {"hospital_a": 1}), place("y", {}, {"hospital": "b"})], {"CPU": 1}, Cluster(NODES))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"pinned": [{"sources": ["e.jsonl"], "resources": {"x": 1}}]}, "R902", "no such source"),
    ({"data.validation": 0.2}, "R902", "do not leave their nodes"),
    ({"scale.workers": 0}, "R902", "one process"),
    ({"partition": {"method": "iid"}}, "R105", "method: sources"),
    ({"strategy": "fedbuff"}, "R105", "fedbuff"),
    ({"pinned": [*PINS, PINS[0]]}, "R105", "pinned twice"),
    ({"pinned": [{"sources": ["a.jsonl"]}]}, "R105", "which say where"),
    ({"pinned": [{"sources": ["a.jsonl"], "resources": {"CPU": 1}}]}, "R105", "custom resource"),
    ({"pinned": [{"sources": ["a.jsonl"], "label_selector": {"x": "in("}}]}, "R105", "no selector"),
]


@pytest.mark.parametrize(("settings", "id", "words"), REFUSED, ids=lambda item: str(item)[:50])
def test_bad_input_is_one_clear_message(
    recipe: Recipes, tmp_path: Path, settings: dict[str, Any], id: str, words: str
) -> None:
    changes = dict(settings)
    with pytest.raises(UsageError) as caught:
        run(pinned(recipe, tmp_path, changes.pop("pinned", PINS), **changes))
    assert caught.value.id == id and words in str(caught.value)


def test_a_dry_run_asks_no_node(recipe: Recipes, tmp_path: Path) -> None:
    plain = pinned(recipe, tmp_path, PINS)
    for source in plain["data"]["train"]:
        Path(source).unlink()
    planned = dry_run(plain)
    assert planned.clients == dict.fromkeys(["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"])
    assert planned.run.plan["clients"] == 4 and planned.run.plan["workers"] == 3 and not planned.run.memory


# On nodes

SEEN = """
import os

def seen(row):
    with open({log!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{os.environ.get('RAYFT_HOME', '-')}} {{row['messages'][0]['content']}}\\n")
    return row
"""


@pytest.mark.long
def test_data_is_read_on_its_node_and_changes_no_number(
    recipe: Recipes, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes with homes of their own: each renders its own sources, the driver none, and the adapters are those of
    the same clients on one worker."""
    monkeypatch.delenv("RAYFT_HOME", raising=False)
    log = tmp_path / "seen"
    (tmp_path / "seen.py").write_text(SEEN.format(log=str(log)))
    held = write_rows(tmp_path / "held.jsonl", chat_rows(5, seed=9))
    same = {"evaluate": {"holdout": 0.2}, "data.validation": [held], "data.function": f"{tmp_path / 'seen.py'}:seen"}
    pins = [PINS[0], {**PINS[1], "sources": ["b.jsonl", "c.jsonl", "d.jsonl"]}]
    homes = {"a": tmp_path / "home-a", "b": tmp_path / "home-b"}
    with ExitStack() as nodes:
        nodes.enter_context(node(ray_cluster, homes["a"], '--resources={"hospital_a": 1}'))
        nodes.enter_context(node(ray_cluster, homes["b"], "--labels=hospital=b"))
        with pytest.raises(UsageError, match="R906"):
            run(pinned(recipe, tmp_path, [{"sources": ["a.jsonl"], "resources": {"hospital_x": 1}}]), quiet=True)
        log.unlink(missing_ok=True)
        result = run(pinned(recipe, tmp_path, pins, **same), quiet=True)
    lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
    readers = {name: {home for _, home, text in lines if text == f"rows of {name}"} for name in "abcd"}
    assert readers == {name: {str(homes["a" if name == "a" else "b"])} for name in "abcd"}
    assert str(os.getpid()) not in {pid for pid, _, _ in lines}, "the driver has read none"
    assert len(list((homes["a"] / "data").glob("*/train.arrow"))) == 1
    assert len(list((homes["b"] / "data").glob("*/train.arrow"))) == 3
    assert not Path(result.path, "partition.npz").exists()
    rows = RunFolder.open(result.path).metrics()
    assert rows[-1]["base_loads"] == 2 and rows[-1]["clients"] == 4

    plain = pinned(recipe, tmp_path, [], **same, **{"scale.workers": 1}) | {"name": "plain"}
    other = run(plain, quiet=True)
    for number in (1, 2):
        ours, theirs = (
            load_file(f"{one.path}/rounds/{number}/adapter/adapter_model.safetensors") for one in (result, other)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, his in zip(rows, RunFolder.open(other.path).metrics(), strict=True):
        for name in ("loss", "validation_loss", "federated_loss", "gap"):
            assert mine[name] == his[name], name


@pytest.mark.long
def test_a_place_that_goes_costs_its_clients_only(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 1.0)
    sites = (0, 1, 0, 1, 0, 1, 0)
    plan = Plan("toy", len(sites), seed=3, learning_rate=0.1, sites=sites)
    federate = Federate(rounds=3, pack_size=2, evaluate={"holdout": 0.5})

    def federation(workers: Any, name: str, told: Callable[[dict[str, Any]], None]) -> RunFolder:
        plain = {"name": name, "storage": str(tmp_path / "runs"), "model": {"base": "m"}, "data": {"train": "x"}}
        folder = RunFolder.create(load(plain), "federate")
        events = folder.events_log()
        try:
            Federation(
                federate,
                plan,
                workers,
                Books(folder),
                export=export,
                told=told,
                event=lambda kind, **facts: events.append({"kind": kind, **facts}),
            ).run()
        finally:
            workers.close()
        folder.release()
        return folder

    with ExitStack() as nodes:
        nodes.enter_context(node(ray_cluster, tmp_path / "home-a", '--resources={"hospital_a": 1}'))
        process = nodes.enter_context(node(ray_cluster, tmp_path / "home-b", "--labels=hospital=b"))
        places = [
            Place(ToyJob(), {"CPU": 1, "hospital_a": 1}, {}, "1 hospital_a"),
            Place(ToyJob(), {"CPU": 1}, {"hospital": "b"}, "the label hospital: b"),
        ]
        calm = federation(Actors(ToyJob(), 1, {}, sites=places), "calm", lambda row: None)
        here = federation(Here(ToyJob()), "here", lambda row: None)
        assert numbers(Holder(calm)) == numbers(Holder(here)), "where clients are changes nothing"

        def stop(row: dict[str, Any]) -> None:
            if row["round"] == 1:
                local.stop([process])

        folder = federation(Actors(ToyJob(), 1, {}, sites=places), "cut", stop)
    rows = folder.metrics()
    assert [(row["clients"], row["failed"]) for row in rows] == [(7, 0), (4, 3), (4, 3)]
    failed = [event for event in folder.events() if event["kind"] == "client_failed"]
    assert {event["client"] for event in failed} == {1, 3, 5}
    assert all("no living one is the label hospital: b" in event["reason"] for event in failed)
    last = [event for event in folder.events() if event["kind"] == "evaluation"][-1]
    assert set(last["losses"]) == {"0", "2", "4", "6"}


class Holder:
    def __init__(self, run: RunFolder) -> None:
        self.run = run
