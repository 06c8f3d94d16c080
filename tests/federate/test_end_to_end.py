"""What a federation is for: a model that is better than any client's own, also under privacy that is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayft.federate import run
from rayft.federate.data import Shares
from rayft.runs.folder import RunFolder
from rayft.train import fit
from tests.train.conftest import chat_rows, write_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_privacy_is_accounted_for_and_the_loss_still_falls(tiny_model_factory: Any, tmp_path: Path) -> None:
    """256 clients with two chats each, q = 0.5, z = 1, 20 rounds: epsilon 11.1 at delta 1e-3."""
    base = tiny_model_factory(hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    plain = {
        "name": "private",
        "storage": str(tmp_path / "runs"),
        "model": {"base": base, "dtype": "fp32"},
        "adapter": {"rank": 8, "alpha": 64, "target_modules": ["o_proj", "down_proj"]},
        "data": {"train": write_rows(tmp_path / "chats.jsonl", chat_rows(560)), "validation": 0.08, "max_length": 64},
        "train": {"global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 0.02, "report_to": []},
        "scale": {"workers": 0, "device": "cpu"},
        "federate": {
            "clients": 256,
            "rounds": 20,
            "local_steps": 2,
            "pack_size": 32,
            "cohort": {"size": 0.5, "sampling": "poisson"},
            "privacy": {"noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-3, "noise_seed": 5},
        },
    }
    result = run(plain, quiet=True)
    weights = load_file(Path(result.folder, "adapter_model.safetensors"))
    assert sum(tensor.numel() for name, tensor in weights.items() if ".lora_B" in name) <= 2000
    rows = RunFolder.open(result.path).metrics()
    assert rows[-1]["epsilon"] == pytest.approx(11.1, abs=0.05)
    assert [row["epsilon"] for row in rows] == sorted(row["epsilon"] for row in rows)
    assert all(100 < row["clients"] < 160 for row in rows), "128 expected"
    losses = [row["validation_loss"] for row in rows]
    assert losses[-1] < losses[0] - 0.1 and min(losses) == min(losses[-5:])


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(3600)
def test_eight_clients_learn_more_together_than_any_alone(ray_cluster: str, tmp_path: Path) -> None:
    """SmolLM2, Dirichlet 0.3 over the orders' tasks, two actors. Alone a client makes as many steps, on its own."""
    rows = []
    for line in (ROOT / "examples/data/orders.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({**row, "task": json.loads(row["messages"][-1]["content"])["name"]})
    data = write_rows(tmp_path / "orders.jsonl", rows)
    held_out = [{"path": str(ROOT / "examples/data/orders_heldout.jsonl"), "limit": 24}]
    plain: dict[str, Any] = {
        "storage": str(tmp_path / "runs"),
        "model": {"base": "smollm2-135m-instruct"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"train": data, "validation": held_out, "max_length": 128},
        "train": {"global_batch_size": 4, "learning_rate": 1e-3, "report_to": []},
    }
    split = {"method": "dirichlet", "column": "task", "alpha": 0.3, "min_size": 4}
    settings = {"clients": 8, "partition": split, "rounds": 5, "local_steps": 4, "pack_size": 4}
    two = {"name": "together", "scale": {"device": "cpu", "workers": 2}, "federate": settings}
    together = run(plain | two, quiet=True)
    logged = RunFolder.open(together.path).metrics()
    assert logged[-1]["base_loads"] == 2 and all(row["gap"] < 1e-9 for row in logged)
    shares = Shares.read(f"{together.path}/partition.npz")
    assert sum(shares.sizes) == len(rows), "no row was left out, so indices are those of the file"
    alone = []
    for client in range(8):
        own = write_rows(tmp_path / f"client-{client}.jsonl", [rows[index] for index in shares.of(client)])
        steps = {"max_steps": 20, "lr_scheduler_type": "constant", "warmup_steps": 0.0, "eval_steps": 20}
        changes = {"data": plain["data"] | {"train": own}, "train": plain["train"] | steps}
        recipe = plain | {"name": f"alone-{client}", "scale": {"device": "cpu", "workers": 0}, **changes}
        alone.append(fit(recipe, answer=None, quiet=True).metrics["validation_loss"])
    assert together.metrics["validation_loss"] < min(alone), alone
