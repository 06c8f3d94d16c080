"""What is served, as the driver decides it for processes elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.serve.plan import plan


def test_paths_are_absolute_and_buckets_stay(
    tiny_model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["storage=mine", "serve.api_keys=keys.json", "serve.roots=[more, 's3://bucket/adapters', 'hf://someone']"]
    made = plan([], [f"model.base={tiny_model_folder}", *keys])
    assert made.recipe.storage == str(tmp_path / "mine")
    assert made.recipe.serve.api_keys == str(tmp_path / "keys.json")
    assert made.recipe.serve.roots == [str(tmp_path / "more"), "s3://bucket/adapters", "hf://someone"]
    assert made.registry == str(tmp_path / "mine" / "registry") and made.folder.startswith(str(tmp_path / "mine"))
    elsewhere = plan([], [f"model.base={tiny_model_folder}", *keys, "serve.registry=names"])
    assert elsewhere.registry == str(tmp_path / "names")
