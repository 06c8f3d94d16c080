"""A whole federation under privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayft.federate import run
from rayft.runs.folder import RunFolder
from tests.train.conftest import chat_rows, write_rows


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
