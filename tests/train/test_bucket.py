"""Runs whose storage is a bucket (S3 as pyarrow speaks it): what one machine left there, another one goes on with."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayft.errors import RunStopped
from rayft.evaluate import score
from rayft.runs.folder import RunFolder
from rayft.runs.reference import resolve
from rayft.runs.storage import locate
from rayft.train import TrainResult
from tests.train.conftest import Recipes
from tests.train.curves import assert_same, curve_of
from tests.train.test_chaos import TWO, driver, wait_for
from tests.train.test_faults import events, faulty, train  # noqa: F401 - faulty is a fixture

pytestmark = pytest.mark.long


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAYFT_HOME", str(tmp_path / "machine-1"))
    return str(s3.uri(f"bucket/{uuid.uuid4().hex}"))


@pytest.fixture
def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on nothing that this machine kept is found: neither in RAYFT_HOME nor among temporary files."""

    def change() -> None:
        monkeypatch.setenv("RAYFT_HOME", str(tmp_path / "machine-2"))
        (tmp_path / "tmp-2").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp-2"))

    return change


def weights(path: str) -> dict[str, Any]:
    return load_file(Path(path, "adapter_model.safetensors"))


def assert_same_weights(in_bucket: TrainResult, local: TrainResult, storage: str) -> None:
    """The adapter of the bucket's run, found by reference, is the local run's."""
    found = weights(resolve(f"run:{in_bucket.name}", storage).fetch())
    expected = weights(local.folder)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_stopped_on_one_machine_and_resumed_on_another(
    faulty: Callable[..., Any],  # noqa: F811
    bucket: str,
    another_machine: Callable[[], None],
) -> None:
    undisturbed = train(faulty("plain"))
    more = {"train.save_total_limit": 2, "train.report_to": ["tensorboard"]}
    plain = faulty("interrupt_once", storage=bucket, **more)
    with pytest.raises(RunStopped):
        train(plain)
    another_machine()
    run = RunFolder.open(locate(bucket) / "interrupt-once")
    assert sorted(run.checkpoints()) == [8, 11] and [row["step"] for row in run.metrics()] == list(range(1, 12))
    resumed = train(plain, mode="resume")
    assert curve_of(resumed.path) == curve_of(undisturbed.path)
    assert [event["step"] for event in events(resumed.path, "restart")] == [11]
    assert_same_weights(resumed, undisturbed, bucket)
    held_out = [f"storage={bucket}", "data.validation=0.2", "evaluate.metrics=[]"]
    measured = score("run:interrupt-once", held_out, quiet=True)
    assert measured.base and measured.tuned and measured.tuned.validation_loss < measured.base.validation_loss
    model, tokenizer = resumed.load()
    assert model.peft_config and tokenizer.chat_template
    assert (locate(bucket) / "interrupt-once" / "report.md").is_file()
    assert len((locate(bucket) / "interrupt-once" / "tensorboard").children()) == 2, "one file of each machine"


@pytest.mark.slow
def test_a_killed_driver_and_resume_on_another_machine(
    ray_cluster: str, recipe: Recipes, bucket: str, another_machine: Callable[[], None], tmp_path: Path
) -> None:
    slow = {"train.max_steps": 60, "train.save_steps": 10}
    undisturbed = train(recipe(name="calm", **TWO | slow | {"scale.workers": 0}))
    keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"]
    plain = recipe(storage=bucket, **TWO | slow | {"scale.env": keys})
    process = driver(plain, tmp_path)
    path = locate(bucket) / "test"

    def under_way() -> bool:
        return (path / "run.json").is_file() and len(RunFolder.open(path).checkpoints()) >= 2

    wait_for(under_way, 240, tmp_path / "driver.log")
    process.kill()
    process.wait()
    another_machine()
    assert driver(plain, tmp_path, "--resume").wait(300) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert_same(curve_of(str(path)), curve_of(undisturbed.path))
    assert events(str(path), "restart")[-1]["step"] >= 20
    found = resolve("run:test", bucket)
    assert found.kind == "adapter" and weights(found.fetch()).keys() == weights(undisturbed.folder).keys()
