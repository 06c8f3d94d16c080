"""`scale.workers: [min, max]` on a cluster that loses a node and gets another one, within one run."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayft.runs.folder import RunFolder
from rayft.train import launch
from tests.train import faults
from tests.train.conftest import Recipes
from tests.train.curves import assert_same, curve_of
from tests.train.test_chaos import train, wait_for
from tests.train.test_faults import events

_spec = importlib.util.spec_from_file_location("local", Path(__file__).parents[2] / "cluster" / "local.py")
assert _spec is not None and _spec.loader is not None
local = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(local)


@contextmanager
def node(address: str, log: Path) -> Iterator[Any]:
    """A node that joins the session's cluster with a seat for one worker; yields its process, which leads its group."""
    options = argparse.Namespace(cpus=1, object_store_mb=80)
    arguments = [f"--address={address}", '--resources={"seat": 1}', *local.node_arguments(options, local.free_ports(4))]
    process = local.start_node(arguments, dict(os.environ), log)
    try:
        yield process
    finally:
        local.stop([process])


def test_a_node_goes_and_another_comes(
    recipe: Recipes, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_TEST_FAULT", str(tmp_path))
    monkeypatch.setattr(launch, "RESIZE_SECONDS", 1.0)
    common = {"train.loss_function": f"{faults.__file__}:paced", "train.micro_batch_size": 2, "train.max_steps": 60}
    calm = train(recipe(name="calm", **common))
    elastic = {
        "scale.workers": [1, 2],
        "scale.resources_per_worker": {"seat": 1},
        "scale.env": ["RAYFT_TEST_FAULT"],
        "train.save_steps": 2,
    }
    plain = recipe(name="elastic", **common | elastic)
    path = Path(plain["storage"], "elastic")
    (tmp_path / "pace").write_text("1.0")

    def under_way(sizes: list[int], beyond: int = 0) -> bool:
        """Whether the run has had these numbers of workers, one after the other, and is `beyond` steps further."""
        if not (path / "run.json").exists():
            return False
        started = events(str(path), "started")
        rows = RunFolder.open(path).metrics()
        seen = [size for size, _ in itertools.groupby(event["workers"] for event in started)]
        return seen == sizes and bool(rows) and rows[-1]["step"] >= started[-1]["step"] + beyond

    log = tmp_path / "nodes.log"
    outcome: list[Any] = []
    run = threading.Thread(target=lambda: outcome.append(train(plain)), daemon=True)
    with node(ray_cluster, log) as leaving, node(ray_cluster, tmp_path / "staying.log"):
        wait_for(lambda: seats(2), 60, log)
        run.start()
        wait_for(lambda: under_way([2], beyond=3), 120, log)
        os.killpg(leaving.pid, signal.SIGKILL)
        wait_for(lambda: under_way([2, 1], beyond=1), 150, log)
        with node(ray_cluster, tmp_path / "coming.log"):
            wait_for(lambda: under_way([2, 1, 2]), 150, tmp_path / "coming.log")
            (tmp_path / "pace").unlink()
            run.join(120)
    assert outcome, "the run did not end"
    assert_same(curve_of(str(path)), curve_of(calm.path), loss=1e-5, norm=1e-4)
    tokens = [[row["tokens"] for row in RunFolder.open(which).metrics()] for which in (path, calm.path)]
    assert tokens[0] == tokens[1], "the global batch changed with the workers"
    reasons = [event["reason"] for event in events(str(path), "restart")]
    assert reasons[0] == "a worker died" and reasons[-1] == "another number of workers"


def seats(count: int) -> bool:
    import ray

    return ray.cluster_resources().get("seat", 0) == count
