"""What `rayft submit` sends: the recipe with relative paths, the files it names, and nothing too large or secret."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.config import Resolved, load
from rayft.errors import UsageError
from rayft.runtime import jobs, package
from rayft.runtime.package import pack, user_values

Make = Callable[..., Resolved]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project folder, which is the working directory."""
    project = tmp_path / "project"
    (project / "shards" / "deep").mkdir(parents=True)
    row = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    for name in ("rows.jsonl", "shards/a.jsonl", "shards/deep/b.jsonl", "held.jsonl"):
        (project / name).write_text(row)
    (project / "mine.py").write_text("def clean(row):\n    return row\n")
    (project / "loss.py").write_text("def loss(logits, targets, weights):\n    return logits.sum()\n")
    (project / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(project)
    return project


def recipe(**data: Any) -> dict[str, Any]:
    return {
        "name": "demo",
        "storage": "/shared/runs",
        "model": {"base": "smollm2-135m-instruct"},
        "data": {"train": "rows.jsonl", **data},
    }


def test_files_travel_and_the_recipe_still_means_the_same(home: Path, tmp_path: Path) -> None:
    source = recipe(
        train=["rows.jsonl", {"path": "shards/**/*.jsonl", "limit": 5}],
        validation="held.jsonl",
        chat_template="chat.jinja",
        function="mine:clean",
    )
    source["train"] = {"loss_function": "loss.py:loss"}
    resolved = load(source)
    there = tmp_path / "there"
    packed = pack(resolved, there, home)
    assert sorted(packed.files) == [
        "files/0/rows.jsonl",
        "files/1/a.jsonl",
        "files/1/deep/b.jsonl",
        "files/2/held.jsonl",
        "files/3/chat.jinja",
        "files/4/loss.py",
        "mine.py",
    ]
    with contextlib.chdir(there):
        again = load("recipe.yaml").recipe
    assert [s.path for s in again.data.train] == [str(there / "files/0/rows.jsonl"), str(there / "files/1/**/*.jsonl")]
    assert Path(again.data.train[0].path).read_text() == (home / "rows.jsonl").read_text()
    assert again.train.loss_function == f"{there}/files/4/loss.py:loss" and again.data.function == "mine:clean"
    same = {"data", "train"}
    assert again.model_dump(exclude=same) == resolved.recipe.model_dump(exclude=same)


def test_only_what_the_user_decided_is_written(home: Path) -> None:
    written = user_values(load({**recipe(), "adapter": {}, "seed": 3}))
    assert written["adapter"] == {} and written["seed"] == 3, "an empty section is a decision too"
    assert set(written) == {"name", "storage", "seed", "model", "adapter", "data"}


def test_what_is_not_here_stays_as_written(home: Path, tmp_path: Path) -> None:
    source = recipe(train=["s3://bucket/rows.jsonl", "org/dataset"])
    assert pack(load(source), tmp_path / "there", home).files == {}
    written = user_values(load(source))
    assert [s["path"] for s in written["data"]["train"]] == ["s3://bucket/rows.jsonl", "org/dataset"]


def test_a_model_folder_travels(home: Path, tmp_path: Path, tiny_model_folder: str) -> None:
    packed = pack(load({**recipe(), "model": {"base": tiny_model_folder}}), tmp_path / "there", home)
    names = {name.split("/")[-1] for name in packed.files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_too_large_names_the_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("rows.jsonl", "r+b") as file:
        os.truncate(file.fileno(), 101 * 2**20)
    with pytest.raises(UsageError, match=r"R511.*101.0 MiB.*100 MiB.*rows.jsonl \(101.0 MiB\)"):
        pack(load(recipe()), tmp_path / "there", home)
    assert not (tmp_path / "there").exists()
    monkeypatch.setattr(package, "UPLOAD_LIMIT", 200 * 2**20)
    assert pack(load(recipe()), tmp_path / "there", home).files


@pytest.mark.parametrize("storage", ["runs", "./runs", None])
def test_a_storage_of_this_machine_is_refused(home: Path, storage: str | None) -> None:
    source = recipe()
    if storage:
        source["storage"] = storage
    else:
        del source["storage"]
    with pytest.raises(UsageError, match="R513"):
        jobs.submit(source, address="http://127.0.0.1:9")
    with pytest.raises(UsageError, match="R512"):
        jobs.submit(source, ["storage=/shared/runs"], address="http://127.0.0.1:9")


def test_nobody_at_the_address(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for address, problem in (
        ("http://127.0.0.1:9", "nothing answers"),
        ("head:8265", "not a URL"),
        (None, "no cluster"),
    ):
        with pytest.raises(UsageError, match=f"R512: .*{problem}"):
            jobs.submit(recipe(), address=address)
