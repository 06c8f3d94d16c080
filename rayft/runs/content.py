"""The identity of an adapter or a model: a hash of its tensors and configuration, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rayft.runs.storage import Location
from rayft.runs.tensors import DTYPES, check_whole, read_bytes, read_header

# Where the base lay and which library wrote the file say nothing about what the adapter computes.
_PLACE = {
    "base_model_name_or_path",
    "_name_or_path",
    "revision",
    "peft_version",
    "transformers_version",
    "inference_mode",
}
_LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "use_dora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
    "fan_in_fan_out": False,
}
"""The part of a LoRA's configuration that changes what it computes, with PEFT's defaults."""
_TOKENS = "trainable_token_indices"
"""Part of it where it is set."""


def content_hash(folder: Location) -> str:
    """sha256 over configuration and tensors (name, dtype, shape, bytes) of a folder of safetensors, in order of names.

    Sharding, the order of tensors in a file and the place of the base model do not change it.
    """
    digest = hashlib.sha256()
    config = folder / ("adapter_config.json" if (folder / "adapter_config.json").is_file() else "config.json")
    digest.update(json.dumps(_canonical(json.loads(config.read())), sort_keys=True).encode())
    files = [file for file in folder.children() if file.name.endswith(".safetensors")]
    tensors = [(tensor, file) for file in files for tensor in read_header(file)]
    for tensor, file in sorted(tensors, key=lambda pair: (pair[0].name, pair[1].path)):
        digest.update(f"{tensor.name} {tensor.dtype}{list(tensor.shape)} ".encode())
        for block in read_bytes(file, tensor):
            digest.update(block)
    return digest.hexdigest()


def lora_hash(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes | memoryview]]]
) -> str:
    """sha256 of what an adapter computes: two LoRA adapters with the same hash give the same answers.

    config: PEFT's configuration, of which the part counts that changes numbers. tensors: (PEFT's name, number format as
    torch names it, shape, blocks of bytes), in any order.
    """
    meaning = {name: default if config.get(name) is None else config[name] for name, default in _LORA.items()}
    if config.get(_TOKENS):
        meaning[_TOKENS] = config[_TOKENS]
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True, default=str).encode())
    for name, dtype, shape, blocks in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(f"{name} {dtype} {tuple(shape)}".encode())
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def lora_hash_of_files(config: Mapping[str, Any], weights: Location) -> str:
    """`lora_hash` of an adapter's configuration and its safetensors file, read without torch.

    Raises ValueError for a file that is damaged or not complete.
    """
    tensors = read_header(weights)
    check_whole(weights, tensors)
    return lora_hash(config, ((t.name, DTYPES[t.dtype][0], t.shape, read_bytes(weights, t)) for t in tensors))


def _canonical(value: Any) -> Any:
    """Configuration without places; lists of names sorted, since PEFT keeps them as sets."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if key not in _PLACE}
    if isinstance(value, list):
        return sorted(value) if all(isinstance(item, str) for item in value) else [_canonical(item) for item in value]
    return value
