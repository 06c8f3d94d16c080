"""Manifests prove that a checkpoint is whole.

Every rank writes ``manifest-RANK.json`` beside the files it saved: their sizes and CRC-32 sums, and how many ranks
save. A checkpoint is complete when the manifests of all ranks are there and every file is as they say. That needs no
order between uploads: whatever was cut off, something is missing or differs.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rayft.runs.storage import Location, locate, write_atomic

_PREFIX = "manifest-"
_CHUNK = 1 << 22


def write_manifest(
    folder: str | os.PathLike[str], step: int, rank: int = 0, ranks: int = 1, files: Iterable[str] | None = None
) -> Path:
    """Write this rank's manifest into a local checkpoint folder, after everything it describes.

    ``files`` are relative names; by default everything in the folder but manifests, which is right where each rank
    saves into a folder of its own before the upload merges them. ``ranks`` is how many ranks write a manifest.
    """
    root = Path(folder)
    names = sorted(files) if files is not None else sorted(_names(root))
    entries = {name: {"size": (root / name).stat().st_size, "crc32": _crc32(locate(root / name))} for name in names}
    target = root / f"{_PREFIX}{rank}.json"
    write_atomic(target, json.dumps({"step": step, "rank": rank, "ranks": ranks, "files": entries}, indent=1))
    return target


def step_of(folder: str | os.PathLike[str] | Location) -> int | None:
    """The optimiser step of a checkpoint, or None when a manifest is missing or a file is absent or of the wrong size.

    Reads names, sizes and manifests only; `verify` reads every byte.
    """
    manifests = _manifests(locate(folder))
    if not manifests or _problems(locate(folder), manifests, deep=False):
        return None
    return int(manifests[0]["step"])


def verify(folder: str | os.PathLike[str] | Location) -> list[str]:
    """What is wrong with a checkpoint, one line per problem; empty when every byte is as it was saved."""
    location = locate(folder)
    return _problems(location, _manifests(location), deep=True)


def _problems(location: Location, manifests: list[dict[str, Any]], deep: bool) -> list[str]:
    if not manifests:
        return ["it has no manifest: saving did not end"]
    problems = []
    expected = manifests[0]["ranks"]
    if len(manifests) < expected:
        problems.append(f"{len(manifests)} of {expected} ranks have finished saving")
    if len({manifest["step"] for manifest in manifests}) > 1:
        problems.append("its manifests are of different steps")
    sizes = location.files()
    for manifest in manifests:
        for name, entry in manifest["files"].items():
            if name not in sizes:
                problems.append(f"{name} is missing")
            elif sizes[name] != entry["size"]:
                problems.append(f"{name} has {sizes[name]} of {entry['size']} bytes")
            elif deep and _crc32(location / name) != entry["crc32"]:
                problems.append(f"{name} has other content than was saved")
    return problems


def _manifests(location: Location) -> list[dict[str, Any]]:
    """The readable manifests of a checkpoint, by rank. One that was cut off counts as not there."""
    found = []
    for child in location.children():
        if child.name.startswith(_PREFIX) and child.name.endswith(".json"):
            try:
                found.append(json.loads(child.read()))
            except ValueError:
                continue
    return sorted(found, key=lambda manifest: int(manifest["rank"]))


def _names(root: Path) -> Iterable[str]:
    for path in root.rglob("*"):
        if path.is_file() and not path.name.startswith(_PREFIX):
            yield path.relative_to(root).as_posix()


def _crc32(file: Location) -> int:
    value = 0
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        while block := stream.read(_CHUNK):
            value = zlib.crc32(block, value)
    return value
