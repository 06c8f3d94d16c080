from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class LocalCluster:
    """Two Ray nodes with one CPU each and token authentication; ``environment`` is what a client needs."""

    address: str
    dashboard: str
    environment: dict[str, str]

    def client_environment(self, **more: str) -> dict[str, str]:
        mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return {**mine, **self.environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The cluster of cluster/local.py, as a user starts it."""
    log = tmp_path_factory.mktemp("cluster") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "cluster" / "local.py"), "--nodes=2", "--cpus=1", "--wait=180"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        facts = json.loads(line)
        yield LocalCluster(facts["address"], facts["dashboard"], facts["environment"])
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert not Path(facts["folder"]).exists(), "the cluster leaves nothing behind"
