"""Rounds of a federation: seconds and memory with many virtual clients, and how often the base is loaded.

    python benchmarks/federate.py [--quick]

Clients that do nothing (100,000 fp32 numbers each) measure what the machinery costs; clients of a tiny Llama and of
SmolLM2 measure training with it, and are reported apart. Every size runs in a process of its own, on two actors, so
that its memory is its own. The peer's seconds are those of flwr 1.41's simulation with the same clients that do
nothing, measured once on two cores; RAYFT_FLWR_ROUNDS="100=3.3" replaces them by what was measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from claim import claims_only_on_stdout, note, report, skip

HERE = Path(__file__).parent
FLWR = {20: 0.41, 100: 3.3}
"""Clients -> seconds per round of flwr 1.41."""
PEER = "flwr 1.41 simulation, clients that do nothing, 2 cores"


def measured(kind: str, clients: int, rounds: int) -> dict[str, Any]:
    """Rounds in a process of their own: seconds of each, peak memory of driver and worker, base loads."""
    command = [sys.executable, str(HERE / "federate_arm.py"), kind, str(clients), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = statistics.median(found["seconds"])
    note(
        f"{kind}, {clients} clients: {seconds:.3f} s per round, driver {found['driver'] / 1e6:.0f} MB, largest worker "
        f"{found['worker'] / 1e6:.0f} MB, {found['base_loads']} base loads"
    )
    return found


def flwr_seconds() -> dict[int, float]:
    given = os.environ.get("RAYFT_FLWR_ROUNDS", "")
    return FLWR | {
        int(key): float(value) for key, _, value in (item.partition("=") for item in given.split(",") if item)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 5 minutes: no SmolLM2, fewer rounds")
    quick = parser.parse_args().quick
    claims_only_on_stdout()
    rounds = 12 if quick else 30
    idle = {clients: measured("idle", clients, rounds) for clients in (20, 100, 1000)}
    for clients, theirs in flwr_seconds().items():
        report(
            f"federate.rounds_over_flwr_{clients}",
            values=[theirs / one for one in idle[clients]["seconds"]],
            target=30.0 if clients == 100 else 1.0,
            better="higher",
            unit=f"speed-up of a round, {clients} clients that do nothing, 100,000 numbers each",
            ours=statistics.median(idle[clients]["seconds"]),
            peer=PEER,
            peer_value=theirs,
            quick=quick,
        )
    report(
        "federate.driver_memory_1000_over_20",
        values=[idle[1000]["driver"] / idle[20]["driver"]],
        target=1.2,
        better="lower",
        unit="peak memory of the driver, 1000 clients over 20",
        ours=idle[1000]["driver"],
        peer="rayft, 20 clients",
        peer_value=idle[20]["driver"],
        quick=quick,
    )
    sizes = [("tiny", 20, 10)] if quick else [("tiny", 20, 10), ("tiny", 100, 10), ("tiny", 1000, 3), ("smollm2", 8, 3)]
    loads = []
    for kind, clients, count in sizes:
        found = measured(kind, clients, count)
        loads.append(found["base_loads"] / found["actors"])
    if quick:
        skip("federate.smollm2", "only without --quick")
    report(
        "federate.base_loads_per_actor",
        values=loads,
        target=1.0,
        better="lower",
        unit="base loads per actor and run",
        ours=max(loads),
        peer="flwr's FlowerTune template, which loads the base for every message",
        peer_value=20.0,
        quick=quick,
    )


if __name__ == "__main__":
    main()
