"""The identity of an adapter or a model: a hash of its tensors and configuration, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from rayft.runs.storage import Location

# Where the base lay and which library wrote the file say nothing about what the adapter computes.
_PLACE = {
    "base_model_name_or_path",
    "_name_or_path",
    "revision",
    "peft_version",
    "transformers_version",
    "inference_mode",
}
_CHUNK = 1 << 22


def content_hash(folder: Location) -> str:
    """sha256 over configuration and tensors (name, dtype, shape, bytes) of a folder of safetensors, in order of names.

    Sharding, the order of tensors in a file and the place of the base model do not change it.
    """
    digest = hashlib.sha256()
    config = folder / ("adapter_config.json" if (folder / "adapter_config.json").is_file() else "config.json")
    digest.update(json.dumps(_canonical(json.loads(config.read())), sort_keys=True).encode())
    tensors = sorted(
        tensor for file in folder.children() if file.name.endswith(".safetensors") for tensor in _tensors(file)
    )
    for name, description, path, start, length in tensors:
        digest.update(f"{name} {description} ".encode())
        with folder.filesystem.open_input_file(path) as stream:
            stream.seek(start)
            while length > 0:
                block = stream.read(min(length, _CHUNK))
                digest.update(block)
                length -= len(block)
    return digest.hexdigest()


def _tensors(file: Location) -> Iterator[tuple[str, str, str, int, int]]:
    """(name, dtype and shape, file, first byte, bytes) of each tensor: 8 bytes of length, a JSON header, then data."""
    with file.filesystem.open_input_file(file.path) as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, f"{entry['dtype']}{entry['shape']}", file.path, 8 + size + first, last - first


def _canonical(value: Any) -> Any:
    """Configuration without places; lists of names sorted, since PEFT keeps them as sets."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if key not in _PLACE}
    if isinstance(value, list):
        return sorted(value) if all(isinstance(item, str) for item in value) else [_canonical(item) for item in value]
    return value
