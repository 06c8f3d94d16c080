"""What lies in a safetensors file, read from its header alone: 8 bytes of length, a JSON object, then the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from rayft.runs.storage import Location

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Number format as the file names it -> as torch does, and its size in bytes."""
_LONGEST_HEADER = 100 * 2**20
"""The limit of the safetensors library."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Tensor:
    """One entry of the header."""

    name: str
    dtype: str
    """As the file names it: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    length: int
    """Bytes."""


def read_header(file: Location) -> list[Tensor]:
    """The tensors of a file by name; nothing but its header is read. Raises ValueError saying what is wrong with it."""
    size = file.filesystem.get_file_info(file.path).size or 0
    with file.filesystem.open_input_file(file.path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header is cut off ({size} bytes)")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    return sorted((_entry(name, entry, 8 + length) for name, entry in header.items()), key=lambda tensor: tensor.name)


def _entry(name: str, entry: Any, data: int) -> Tensor:
    try:
        first, last = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(length) for length in entry["shape"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"its header does not describe {name!r}") from problem
    if not 0 <= first <= last or any(length < 0 for length in shape):
        raise ValueError(f"its header puts {name!r} at an impossible place")
    return Tensor(name, dtype, shape, data + first, last - first)


def check_whole(file: Location, tensors: list[Tensor]) -> None:
    """That every tensor is of a known number format and there to its last byte, and that nothing else is in the file.

    Raises ValueError saying what is wrong.
    """
    size = file.filesystem.get_file_info(file.path).size or 0
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.name} is of the number format {tensor.dtype}, which is not known here")
        if tensor.length != prod(tensor.shape) * DTYPES[tensor.dtype][1]:
            raise ValueError(f"{tensor.name} has {tensor.length} bytes, which do not fit its shape")
    if not tensors:
        raise ValueError("it holds no tensors")
    end = max(tensor.start + tensor.length for tensor in tensors)
    if size < end:
        raise ValueError(f"it has {size} of {end} bytes: the copy is not complete")
    if size > end:
        raise ValueError(f"it has {size - end} bytes too many")
    by_place = sorted(tensors, key=lambda tensor: (tensor.start, tensor.length))
    for before, after in pairwise(by_place):
        if before.start + before.length != after.start:
            raise ValueError(f"{before.name} and {after.name} do not lie one behind the other")


def read_bytes(file: Location, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of one tensor, in blocks."""
    length = tensor.length
    with file.filesystem.open_input_file(file.path) as stream:
        stream.seek(tensor.start)
        while length > 0 and (block := stream.read(min(length, _CHUNK))):
            yield block
            length -= len(block)
