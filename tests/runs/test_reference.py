"""``run:NAME@...`` finds the right weights, and says what is wrong when it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.config import Resolved
from rayft.errors import UsageError
from rayft.runs.content import content_hash
from rayft.runs.folder import RunFolder
from rayft.runs.manifest import write_manifest
from rayft.runs.reference import parse, resolve
from rayft.runs.storage import locate

Make = Callable[..., Resolved]


def adapter(folder: Path, value: float, **config: object) -> Path:
    """A small adapter folder in PEFT's file layout."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"b": torch.full((2, 3), value), "a": torch.arange(4.0)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": ["q", "v"], **config}))
    return folder


@pytest.fixture
def run(resolved: Make, tmp_path: Path) -> RunFolder:
    """A finished run with checkpoints 10, 20 and 30 (best: 20) and an adapter."""
    run = RunFolder.create(resolved(), "train")
    run.pin(base="base-hash")
    for step in (10, 20, 30):
        local = adapter(tmp_path / f"step{step}", float(step))
        write_manifest(local, step)
        locate(local).copy_to(run.location / "checkpoints" / f"checkpoint_{step}")
    with run.writing("adapter") as folder:
        adapter(folder, 30.0)
    run.finish("finished", best_step=20)
    return run


def test_selectors(run: RunFolder, storage: str) -> None:
    expected = {
        "run:demo": "adapter",
        "run:demo@final": "adapter",
        "run:demo@best": "checkpoints/checkpoint_20",
        "run:demo@last": "checkpoints/checkpoint_30",
        "run:demo@step-10": "checkpoints/checkpoint_10",
    }
    for ref, path in expected.items():
        found = resolve(ref, storage)
        assert (found.path, found.kind, found.base_hash) == (str(run.location / path), "adapter", "base-hash")
        assert Path(found.fetch(), "adapter_config.json").is_file()
    assert resolve("run:demo", storage).content_hash == resolve("run:demo@last", storage).content_hash
    assert resolve("run:demo", storage).content_hash != resolve("run:demo@best", storage).content_hash


def test_folders_of_a_run_an_adapter_and_a_model(run: RunFolder, tmp_path: Path, tiny_model_folder: str) -> None:
    assert resolve(run.path).path == str(run.location / "adapter")
    assert resolve(str(run.location / "adapter")).base_hash == "base-hash"
    alone = adapter(tmp_path / "alone", 1.0)
    found = resolve(str(alone))
    assert (found.path, found.kind, found.base_hash, found.run) == (str(alone), "adapter", None, None)
    assert resolve(tiny_model_folder).kind == "model"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"R414.*neither an adapter"):
        resolve(str(tmp_path / "empty"))


def test_trials_and_rounds(run: RunFolder, storage: str) -> None:
    for name in ("trials/3/adapter", "rounds/0/adapter"):
        with run.writing(name) as folder:
            adapter(folder, 3.0)
    assert resolve("run:demo@trial-3", storage).path == str(run.location / "trials/3/adapter")
    assert resolve("run:demo@round-0", storage).path == str(run.location / "rounds/0/adapter")


def test_search_order(resolved: Make, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(place: str) -> None:
        with RunFolder.create(resolved(f"storage={place}"), "train") as run:
            with run.writing("adapter") as folder:
                adapter(folder, 1.0)
            run.finish("finished")

    finished(str(tmp_path / "runs"))
    assert resolve("run:demo", storage).path == str(tmp_path / "runs/demo/adapter")
    finished(str(tmp_path / "env"))
    monkeypatch.setenv("RAYFT_STORAGE", str(tmp_path / "env"))
    assert resolve("run:demo", storage).path == str(tmp_path / "env/demo/adapter")
    finished(storage)
    assert resolve("run:demo", storage).path.startswith(storage.split("://")[0])


def test_unknown_run_names_the_nearest(run: RunFolder, storage: str) -> None:
    with pytest.raises(UsageError, match=r"R410.*no run 'deno'") as caught:
        resolve("run:deno", storage)
    assert caught.value.hint == "did you mean demo?"


def test_unfinished_run_names_its_last_complete_step(run: RunFolder, storage: str) -> None:
    run.finish("stopped")
    with pytest.raises(UsageError, match=r"R412.*not finished") as caught:
        resolve("run:demo", storage)
    assert "run:demo@step-30" in (caught.value.hint or "")
    assert resolve("run:demo@last", storage).path == str(run.location / "checkpoints/checkpoint_30")


def test_missing_step_names_those_that_exist(run: RunFolder, storage: str) -> None:
    with pytest.raises(UsageError, match="R413") as caught:
        resolve("run:demo@step-11", storage)
    assert caught.value.hint == "complete checkpoints: step-10, step-20, step-30"


@pytest.mark.parametrize(
    "ref", ["run:", "run:Demo", "run:demo@", "run:demo@step", "run:demo@step-x", "run:demo@newest"]
)
def test_malformed_references(ref: str) -> None:
    with pytest.raises(UsageError, match="R411"):
        parse(ref)


def test_content_hash_is_of_content(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    one = adapter(tmp_path / "one", 1.0)
    same = adapter(tmp_path / "same", 1.0, base_model_name_or_path="/elsewhere", target_modules=["v", "q"])
    (same / "adapter_model.safetensors").unlink()
    save_file({"a": torch.arange(4.0)}, same / "x-1.safetensors", {"format": "pt"})
    save_file({"b": torch.full((2, 3), 1.0)}, same / "x-2.safetensors")
    (same / "README.md").write_text("notes")
    assert content_hash(locate(one)) == content_hash(locate(same))
    others = [adapter(tmp_path / "value", 1.5), adapter(tmp_path / "rank", 1.0, r=8)]
    renamed = Path(shutil.copytree(one, tmp_path / "renamed"))
    save_file({"c": torch.full((2, 3), 1.0), "a": torch.arange(4.0)}, renamed / "adapter_model.safetensors")
    shaped = Path(shutil.copytree(one, tmp_path / "shaped"))
    save_file({"b": torch.full((3, 2), 1.0), "a": torch.arange(4.0)}, shaped / "adapter_model.safetensors")
    hashes = {content_hash(locate(folder)) for folder in [one, *others, renamed, shaped]}
    assert len(hashes) == 5
