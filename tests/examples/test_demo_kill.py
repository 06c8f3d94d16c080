"""`make demo-kill`: two curves on one picture, equal although a worker and the driver were killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def demo(*words: str, cwd: Path) -> dict[str, object]:
    script = str(ROOT / "examples" / "demo_kill.py")
    done = subprocess.run([sys.executable, script, *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_with_a_tiny_model(ray_cluster: str, tiny_model_folder: str, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    plain = {
        "name": "tiny",
        "storage": str(tmp_path / "runs"),
        "model": {"base": tiny_model_folder, "dtype": "fp32"},
        "adapter": {"method": "lora"},
        "data": {"train": str(ROOT / "examples" / "data" / "orders.jsonl")},
        "train": {"max_steps": 120, "global_batch_size": 4, "save_steps": 10, "report_to": []},
        "scale": {"workers": 2, "device": "cpu"},
    }
    recipe.write_text(yaml.safe_dump(plain))
    picture = tmp_path / "tiny.png"
    told = demo(str(recipe), "--out", str(picture), cwd=tmp_path)
    assert told["steps"] == 120
    assert told["restarts"] == 2
    assert told["largest_loss_difference"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(3600)
def test_with_the_quickstart(ray_cluster: str, tmp_path: Path) -> None:
    """The real model in its own number format; what it generates at evaluations is no part of the curve."""
    short = ["train.max_steps=30", "train.save_steps=5", "evaluate.metrics=[]", "evaluate.samples=0"]
    told = demo(f"storage={tmp_path}", "scale.workers=2", *short, cwd=ROOT)
    assert told["steps"] == 30
    assert told["restarts"] == 2
    assert isinstance(told["largest_loss_difference"], float)
    assert told["largest_loss_difference"] <= 2e-6
    assert (tmp_path / "demo-kill.png").read_bytes().startswith(b"\x89PNG")
