"""Where a source lies: a local file, a folder, a glob pattern, a bucket, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from rayft.config.data import Source
from rayft.errors import UsageError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files of `datasets.save_to_disk` that hold no rows."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class File:
    """One file of a source on its file system."""

    filesystem: fs.FileSystem
    path: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def kind(self) -> str:
        """The suffix that says how to read it, without that of a compression; empty when unknown."""
        name = self.name.lower()
        for compression in COMPRESSIONS:
            name = name.removesuffix(compression)
        return next((kind for kind in KINDS if name.endswith(kind)), "")

    def lines(self) -> Iterator[str]:
        """The lines with their ends, decompressed by the file's suffix, as UTF-8 (a byte order mark is dropped).

        Only a newline ends a line: JSON strings may hold other line separators, such as U+2028, as they are.
        """
        with self.filesystem.open_input_stream(self.path) as stream:
            yield from io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="\n")

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            while block := stream.read(2**22):
                digest.update(block)
        return digest.hexdigest()


def find(source: Source) -> list[File] | None:
    """The files of a source, sorted by path; None when its path is the id of a Hub data set.

    Raises UsageError R201 when nothing is there, R202 when a file is of no kind that we read.
    """
    filesystem, path = _filesystem(source.path)
    try:
        files = _files(filesystem, path, source.split)
    except OSError as error:
        raise UsageError(
            "R201", f"{source.path}: cannot be reached: {error}", "check the path and the access to it"
        ) from error
    if files:
        if unknown := next((file for file in files if not file.kind), None):
            raise UsageError(
                "R202", f"{unknown.path}: not a kind of file that is read here", f"known: {', '.join(KINDS)}"
            )
        return files
    if _HUB_ID.fullmatch(source.path) and not source.path.lower().endswith(KINDS):
        return None
    raise UsageError(
        "R201",
        f"{source.path}: no data file, folder or match for the pattern is there",
        "paths in a recipe are taken against the working directory; a Hub data set is written owner/name",
    )


def hub_dataset(source: Source) -> Any:
    """The split of a Hub data set (`owner/name`, or `owner/name:configuration`). Raises UsageError R203."""
    from datasets import load_dataset

    name, _, configuration = source.path.partition(":")
    try:
        return load_dataset(name, configuration or None, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            "R203",
            f"{source.path}: there is no such file or folder, and the Hub data set of this name cannot be loaded"
            f" (split {source.split}): {_first_line(error)}",
            "without a way to the Hub: download the data set elsewhere and give the folder with its files as path",
        ) from error


def fingerprint(source: Source) -> list[str]:
    """What identifies the contents of a source: the sha256 of each file, or the fingerprint of the Hub data set."""
    files = find(source)
    return [hub_dataset(source)._fingerprint] if files is None else [file.sha256() for file in files]


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        return fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UsageError(
            "R201", f"{path}: {_first_line(error)}", "known: file:// s3:// gs:// abfss:// hdfs://"
        ) from error


def _files(filesystem: fs.FileSystem, path: str, split: str) -> list[File]:
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return [File(filesystem, path)]
    if info.type == fs.FileType.Directory:
        inside = _listing(filesystem, path)
        if f"{path}/dataset_dict.json" in inside:  # `DatasetDict.save_to_disk`: one folder per split
            inside = [name for name in inside if name.startswith(f"{path}/{split}/")]
        found = [File(filesystem, name) for name in inside]
        return [file for file in found if file.kind and file.name not in _DESCRIPTIONS]
    if "*" in path or "?" in path:
        folder = re.split(r"[*?]", path)[0].rpartition("/")[0]
        pattern = re.compile(_glob(path))
        return [File(filesystem, name) for name in _listing(filesystem, folder or "/") if pattern.fullmatch(name)]
    return []


def _listing(filesystem: fs.FileSystem, folder: str) -> list[str]:
    selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
    return sorted(info.path for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File)


def _glob(pattern: str) -> str:
    """As a regular expression: `**/` any folders, `*` and `?` within one name."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
