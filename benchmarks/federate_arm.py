"""One size of benchmarks/federate.py, in a process of its own: `federate_arm.py idle|tiny|smollm2 CLIENTS ROUNDS`.

Prints one JSON line: seconds of every round but the first, peak memory in bytes of the driver and of the largest worker
(less what Ray's shared memory shows in both), base loads and actors.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from rayft.config import load
from rayft.config.federate import Federate
from rayft.federate.books import Books
from rayft.federate.export import export
from rayft.federate.federation import Federation, Plan
from rayft.federate.messages import Alphas, Answer
from rayft.federate.pool import Actors
from rayft.federate.task import Block, Measured, Opening, Task
from rayft.runs.folder import RunFolder

ACTORS = 2
NUMBERS = 100_000


@dataclass(frozen=True)
class Idle:
    """Clients that send back what they were sent."""

    def make(self) -> Idle:
        return self

    def open(self) -> Opening:
        return Opening({"w": torch.zeros(NUMBERS)}, Alphas(1.0))

    def train(self, task: Task, block: Block) -> list[Answer]:
        return [Answer(client, {"w": task.server.state["w"].clone()}, 1) for client in block.clients]

    def evaluate(self, task: Task, block: Block) -> list[Measured]:
        return []

    def central(self, task: Task) -> float | None:
        return None


def idle(clients: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    plain = {"name": "idle", "storage": str(folder), "model": {"base": "m"}, "data": {"train": "x"}}
    run = RunFolder.create(load(plain), "federate")
    federate = Federate(clients=clients, rounds=rounds)
    pool = Actors(Idle(), ACTORS, {"CPU": 1})
    rows: list[dict[str, Any]] = []
    try:
        Federation(federate, Plan("idle", clients, 1, 1.0), pool, Books(run), export=export, told=rows.append).run()
    finally:
        pool.close()
    return rows


def trained(kind: str, clients: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    from rayft.federate import run

    data = folder / "data.jsonl"
    words = ["order", "two", "pizzas", "for", "Anna", "on", "Friday", "please"]
    chats = [[words[n % 8], words[(n // 8) % 8], words[(n // 64) % 8]] for n in range(max(64, 2 * clients))]
    data.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": " ".join(chat)},
                        {"role": "assistant", "content": " ".join(reversed(chat))},
                    ]
                }
            )
            + "\n"
            for chat in chats
        )
    )
    plain = {
        "name": kind,
        "storage": str(folder / "runs"),
        "model": {"base": "smollm2-135m-instruct" if kind == "smollm2" else tiny(folder)},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"train": str(data), "max_length": 128},
        "train": {"global_batch_size": 2, "report_to": []},
        "scale": {"workers": ACTORS, "device": "cpu", "cpus_per_worker": 1},
        "federate": {"clients": clients, "rounds": rounds, "local_steps": 2},
    }
    return RunFolder.open(run(plain, quiet=True).path).metrics()


def tiny(folder: Path) -> str:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def own_memory() -> int:
    """Peak resident bytes of this process without the pages that it shares with others (Ray's object store)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")
    )
    return int(peak - 1024 * int(status["RssShmem"].split()[0]))


def main() -> None:
    kind, clients, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ray.init("local", num_cpus=ACTORS, object_store_memory=200 * 2**20, include_dashboard=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = idle(clients, rounds, folder) if kind == "idle" else trained(kind, clients, rounds, folder)
    facts = {
        "seconds": [row["seconds"] for row in rows[1:]],
        "driver": own_memory(),
        "worker": int(1e9 * max(row["worker_memory_gb"] for row in rows)),
        "base_loads": rows[-1]["base_loads"],
        "actors": ACTORS,
    }
    ray.shutdown()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
