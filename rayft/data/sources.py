"""Files -> rows. Nothing is skipped in silence: a line that cannot be read ends the run with its place and reason."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from rayft.config.data import Source
from rayft.data.files import File, find, hub_dataset
from rayft.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One row of a source and where it stands, for messages: `orders.jsonl:12`."""

    values: dict[str, Any]
    where: str


def read(source: Source) -> Iterator[Row]:
    """The rows of a source in the order of its files. Raises UsageError R201 to R204."""
    files = find(source)
    if files is None:
        for number, values in enumerate(hub_dataset(source), start=1):
            yield Row(_without_nulls(values), f"{source.path}[{source.split}], row {number}")
        return
    for file in files:
        try:
            yield from _READERS[file.kind](file)
        except UnicodeDecodeError as error:
            raise _malformed(file.name, f"byte {error.start} is not UTF-8") from error
        except pa.ArrowInvalid as error:
            raise _malformed(file.name, str(error)) from error
        except OSError as error:  # not readable, a broken compression, a bucket that went away
            raise UsageError(
                "R201", f"{file.path}: cannot be read: {error}", "check the file and the access to it"
            ) from error


def source_name(source: Source) -> str:
    """The name of a source in statistics."""
    return source.name or source.path.rstrip("/").rsplit("/", 1)[-1]


def source_names(sources: Sequence[Source]) -> list[str]:
    """The names of several sources; one that others have too is numbered."""
    names = [source_name(source) for source in sources]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _jsonl(file: File) -> Iterator[Row]:
    for number, line in enumerate(file.lines(), start=1):
        if line.strip():
            where = f"{file.name}:{number}"
            yield Row(_object(_parse(line, where), where), where)


def _json(file: File) -> Iterator[Row]:
    text = "".join(file.lines())
    if not text.lstrip().startswith("["):  # one object per line under the name of JSON
        yield from _jsonl(file)
        return
    for number, value in enumerate(_parse(text, file.name), start=1):
        where = f"{file.name}, item {number}"
        yield Row(_object(value, where), where)


def _csv(file: File) -> Iterator[Row]:
    delimiter = "\t" if file.kind == ".tsv" else ","
    reader = csv.DictReader(file.lines(), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            where = f"{file.name}:{reader.line_num}"
            if None in values or None in values.values():
                raise _malformed(where, f"not {len(reader.fieldnames or ())} fields as the header has")
            yield Row(dict(values), where)
    except csv.Error as error:
        raise _malformed(f"{file.name}:{reader.line_num}", str(error)) from error


def _lines(file: File) -> Iterator[Row]:
    for number, line in enumerate(file.lines(), start=1):
        if line.strip():
            yield Row({"text": line.rstrip("\r\n")}, f"{file.name}:{number}")


def _parquet(file: File) -> Iterator[Row]:
    with file.filesystem.open_input_file(file.path) as stream:
        yield from _batches(file, pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1000))


def _arrow(file: File) -> Iterator[Row]:
    with file.filesystem.open_input_file(file.path) as stream:
        if stream.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(stream)
            yield from _batches(file, (reader.get_batch(index) for index in range(reader.num_record_batches)))
        else:  # the stream format, in which `datasets` keeps its files
            stream.seek(0)
            yield from _batches(file, pa.ipc.open_stream(stream))


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}


def _batches(file: File, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(_without_nulls(values), f"{file.name}, row {number}")


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every struct of a column the same fields: those that a row did not have come back as null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in values.items()}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise _malformed(where, f"{error.msg} at {place}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(where, f"a row must be a JSON object, this is a {type(value).__name__}")
    return value


def _malformed(where: str, reason: str) -> UsageError:
    return UsageError("R204", f"{where}: malformed: {reason}", "correct the file; nothing was started")
