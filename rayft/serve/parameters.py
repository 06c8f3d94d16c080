"""How many parameters an adapter has, from the heads of its files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

_LONGEST = 100 * 2**20
"""Bytes of a head; safetensors' own limit."""


def count(folder: str) -> int | None:
    """Numbers in all safetensors files of a folder; None where they cannot be read from here."""
    try:
        return sum(_count(file) for file in Path(folder).glob("*.safetensors"))
    except (OSError, ValueError, KeyError, struct.error):
        return None


def _count(file: Path) -> int:
    """The head of a safetensors file: its length as 8 bytes, little-endian, then JSON: name -> dtype, shape, place."""
    with open(file, "rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        if length > _LONGEST:
            raise ValueError(f"{file} has no safetensors head")
        head = json.loads(data.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")
