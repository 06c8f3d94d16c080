"""A damaged checkpoint is recognised, whatever the damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.runs.manifest import step_of, verify, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Saved by two ranks: rank 0 the weights, both their optimiser shard."""
    folder = tmp_path / "checkpoint_1"
    (folder / "zero").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 100)
    for rank in (0, 1):
        (folder / "zero" / f"shard{rank}").write_bytes(b"s" * (rank + 1))
    write_manifest(folder, step=7, rank=0, ranks=2, files=["weights", "zero/shard0"])
    write_manifest(folder, step=7, rank=1, ranks=2, files=["zero/shard1"])
    return folder


def test_whole_checkpoint(checkpoint: Path) -> None:
    assert verify(checkpoint) == [] and step_of(checkpoint) == 7


def test_truncated_file(checkpoint: Path) -> None:
    (checkpoint / "weights").write_bytes(b"short")
    assert verify(checkpoint) == ["weights has 5 of 25600 bytes"] and step_of(checkpoint) is None


def test_flipped_byte_is_found_by_the_deep_check(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "weights").read_bytes())
    data[1000] ^= 1
    (checkpoint / "weights").write_bytes(data)
    assert verify(checkpoint) == ["weights has other content than was saved"] and step_of(checkpoint) == 7


def test_missing_file(checkpoint: Path) -> None:
    (checkpoint / "zero" / "shard1").unlink()
    assert verify(checkpoint) == ["zero/shard1 is missing"] and step_of(checkpoint) is None


def test_a_rank_that_never_finished(checkpoint: Path) -> None:
    (checkpoint / "manifest-1.json").unlink()
    assert verify(checkpoint) == ["1 of 2 ranks have finished saving"] and step_of(checkpoint) is None
    (checkpoint / "manifest-0.json").write_text('{"step": 7, "ra')
    assert verify(checkpoint) == ["it has no manifest: saving did not end"]


def test_manifests_of_two_steps(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest-1.json").read_text()) | {"step": 8}
    (checkpoint / "manifest-1.json").write_text(json.dumps(manifest))
    assert verify(checkpoint) == ["its manifests are of different steps"] and step_of(checkpoint) is None


def test_by_default_everything_in_the_folder_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("1")
    (tmp_path / "c").write_text("")
    listed = json.loads(write_manifest(tmp_path, step=1).read_text())["files"]
    assert sorted(listed) == ["a/b", "c"] and verify(tmp_path) == []
