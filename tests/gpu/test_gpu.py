"""What needs an accelerator: `make test-gpu` on a machine that has one. Two-GPU tests skip where there is one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from conftest import chat_rows, write_rows
from curves import assert_same, curve_of

from rayft.train import TrainResult, fit

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu_cluster() -> Any:
    import ray
    import torch

    ray.init("local", num_cpus=4, num_gpus=torch.cuda.device_count(), include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def recipe(tiny_model_factory: Any, tmp_path: Path) -> Any:
    """A recipe of 20 steps on GPU workers; the model is wide enough for 4-bit blocks."""
    base = tiny_model_factory(hidden_size=256, intermediate_size=512)
    file = write_rows(tmp_path / "chats.jsonl", chat_rows(22))

    def make(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "name": name,
            "storage": str(tmp_path / "runs"),
            "model": {"base": base, "dtype": "fp32"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": file},
            "train": {"max_steps": 20, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
            "scale": {"workers": 1, "device": "gpu"},
        }
        for section, values in sections.items():
            plain[section] = plain[section] | values if values is not None else None
        return plain

    return make


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def train(plain: dict[str, Any]) -> TrainResult:
    return fit(plain, answer=None, quiet=True)


def learned(result: TrainResult) -> None:
    losses = curve_of(result.path).losses
    assert losses[-1] < losses[0]


def test_a_gpu_agrees_with_the_cpu(recipe: Any, gpu_cluster: Any) -> None:
    cpu = train(recipe("cpu", scale={"workers": 0, "device": "cpu"}, train={"optim": "sgd", "learning_rate": 0.05}))
    gpu = train(recipe("gpu", train={"optim": "sgd", "learning_rate": 0.05, "tf32": False}))
    assert_same(curve_of(gpu.path), curve_of(cpu.path), loss=1e-4, norm=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_nf4(recipe: Any, gpu_cluster: Any, strategy: str) -> None:
    nf4 = {"dtype": "bf16", "quantization": "nf4"}
    result = train(recipe(f"nf4-{strategy}", model=nf4, scale={"strategy": strategy, "workers": min(2, gpus())}))
    learned(result)
    model, _ = result.load()
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())


def test_fp16_with_its_scaler(recipe: Any, gpu_cluster: Any) -> None:
    learned(train(recipe("fp16", model={"dtype": "fp16"})))


def test_bf16_full_fine_tuning(recipe: Any, gpu_cluster: Any) -> None:
    learned(train(recipe("bf16", model={"dtype": "bf16"}, adapter=None, train={"learning_rate": 1e-3})))


def test_paged_adamw(recipe: Any, gpu_cluster: Any) -> None:
    learned(train(recipe("paged", train={"optim": "paged_adamw_8bit"})))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_nccl_with_two_workers_agrees_with_one(recipe: Any, gpu_cluster: Any, strategy: str) -> None:
    if gpus() < 2:
        pytest.skip("needs two GPUs")
    sgd = {"optim": "sgd", "learning_rate": 0.05, "tf32": False}
    one = train(recipe("one", train=sgd, adapter=None))
    two = train(recipe(strategy, train=sgd, adapter=None, scale={"workers": 2, "strategy": strategy}))
    assert_same(curve_of(two.path), curve_of(one.path), loss=1e-4, norm=1e-3)


def test_fsdp_on_one_gpu(recipe: Any, gpu_cluster: Any) -> None:
    learned(train(recipe("fsdp", adapter=None, scale={"strategy": "fsdp"})))


def test_quickstart(tmp_path: Path, gpu_cluster: Any) -> None:
    from rayft.evaluate import score

    root = Path(__file__).parents[2]
    result = fit(root / "examples/recipes/quickstart.yaml", [f"storage={tmp_path}", "scale.device=gpu"], quiet=True)
    assert score(result.path).tuned.metrics["exact_match"] >= 0.9
