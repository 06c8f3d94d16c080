"""Small adapter folders as PEFT lays them out, written without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def raw_safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def adapter_folder(folder: Path, value: float, rank: int = 4, **config: Any) -> Path:
    """One adapted layer whose matrices are filled with ``value``; with tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"lora_A": [rank, 3], "lora_B": [2, rank]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for letter, shape in shapes.items():
        block = struct.pack("<f", value) * (shape[0] * shape[1])
        place = [len(data), len(data) + len(block)]
        header[f"base_model.model.layer.{letter}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": place}
        data += block
    (folder / "adapter_model.safetensors").write_bytes(raw_safetensors(json.dumps(header).encode(), data))
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "some/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
