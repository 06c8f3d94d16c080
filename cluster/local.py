#!/usr/bin/env python3
"""A Ray cluster of several nodes on this machine, with token authentication: for trying out and testing jobs.

    python cluster/local.py --nodes 2 --cpus 1

Each node is a process group of its own with its own ports and a small object store; they share a temporary folder,
which also holds the token, so nothing of another Ray on this machine is touched. The first line of standard output is
JSON: the addresses and the environment that clients need. The cluster ends with this process (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HOST = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def start_node(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`ray start --block` as the leader of a new process group."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def node_arguments(options: argparse.Namespace, ports: list[int]) -> list[str]:
    """What every node needs so that two of them fit on one machine."""
    named = ["node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "runtime-env-agent-port"]
    return [
        f"--node-ip-address={HOST}",
        f"--num-cpus={options.cpus}",
        f"--object-store-memory={options.object_store_mb * 2**20}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        *(f"--{name}={port}" for name, port in zip(named, ports, strict=True)),
    ]


def wait_for_nodes(
    dashboard: str, token: str, nodes: int, processes: list[subprocess.Popen[bytes]], seconds: float
) -> None:
    """Until the dashboard counts all nodes. Raises RuntimeError when one ends or the time is over."""
    request = urllib.request.Request(f"{dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a node ended while the cluster was starting")
        with contextlib.suppress(urllib.error.URLError, OSError, KeyError, ValueError):  # not up yet
            with urllib.request.urlopen(request, timeout=5) as answer:
                summary = json.load(answer)["data"]["summary"]
            if sum(node["raylet"].get("state") == "ALIVE" for node in summary) >= nodes:
                return
        time.sleep(0.3)
    raise RuntimeError(f"the cluster did not come up within {seconds:.0f} s")


def stop(processes: list[subprocess.Popen[bytes]], patience: float = 5) -> None:
    """End the process groups of our nodes, and nothing else (`ray stop` would end every Ray on the machine)."""
    for process in reversed(processes):
        _signal_group(process, signal.SIGTERM)
    end = time.monotonic() + patience
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
            process.wait(max(0.1, end - time.monotonic()))
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="logical CPUs of each node")
    parser.add_argument("--object-store-mb", type=int, default=150, help="of each node")
    parser.add_argument("--wait", type=float, default=120, help="seconds until all nodes must be up")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: socket paths are limited to 107 bytes
    token = secrets.token_hex(32)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    environment = {**os.environ, **client, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    # A job's `python` is this one.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    gcs, dashboard, ray_client, *ports = free_ports(3 + 4 * options.nodes)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        head = [
            "--head",
            f"--port={gcs}",
            f"--ray-client-server-port={ray_client}",
            f"--dashboard-host={HOST}",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={folder}",
        ]
        url = f"http://{HOST}:{dashboard}"
        processes.append(start_node(head + node_arguments(options, ports[:4]), environment, folder / "head.log"))
        wait_for_nodes(url, token, 1, processes, options.wait)
        for number in range(1, options.nodes):
            own = node_arguments(options, ports[4 * number : 4 * number + 4])
            join = [f"--address={HOST}:{gcs}", *own]
            processes.append(start_node(join, environment, folder / f"node{number}.log"))
        wait_for_nodes(url, token, options.nodes, processes, options.wait)
        facts = {"address": f"{HOST}:{gcs}", "dashboard": url, "folder": str(folder), "environment": client}
        print(json.dumps(facts), flush=True)
        for name, value in {**client, "RAY_ADDRESS": f"{HOST}:{gcs}", "RAY_API_SERVER_ADDRESS": url}.items():
            print(f"export {name}={value}", file=sys.stderr)
        print("ready; Ctrl-C ends the cluster", file=sys.stderr, flush=True)
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
        print("a node has ended", file=sys.stderr)
        return 1
    except RuntimeError as problem:
        print(f"{problem}:", *(log.read_text() for log in sorted(folder.glob("*.log"))), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        stop(processes)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
