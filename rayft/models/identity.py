"""Hashes that say whether two models or adapters are the same."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rayft.models.hub import cache_folder

VOLATILE = {"base_model_name_or_path", "revision", "_name_or_path", "peft_version", "transformers_version"}
"""Keys of a config that name a place or a version, not a model."""


def content_hash(folder: str | Path) -> str:
    """sha256 (hex) over the tensors and the config of an adapter or model folder.

    The same tensors and settings have the same hash wherever the folder lies and whatever wrote it.

    Raises:
        FileNotFoundError: when the folder holds no config or no weights.
    """
    digest = hashlib.sha256(json.dumps(_config(Path(folder)), sort_keys=True).encode())
    for file in _weight_files(Path(folder)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def base_hash(folder: str | Path) -> str:
    """`content_hash` of a base model's folder, remembered in the cache as long as its files do not change."""
    folder = Path(folder).absolute()
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _weight_files(folder)]
    key = hashlib.sha256(json.dumps([str(folder), _config(folder), stats], sort_keys=True).encode()).hexdigest()
    memo = cache_folder().parent / "hashes" / key
    if not memo.exists():
        memo.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as file:
            file.write(content_hash(folder))
        os.replace(file.name, memo)
    return memo.read_text()


def _config(folder: Path) -> dict[str, Any]:
    """The config without places and versions; lists of names are sets to PEFT, so they are sorted."""
    name = "adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"
    config = json.loads((folder / name).read_text())
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in config.items()
        if key not in VOLATILE
    }


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}")
    return files
