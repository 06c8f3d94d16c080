"""Every kind of file gives the same rows; what cannot be read is named with file, line and reason."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from rayft.config.data import Source
from rayft.data.files import fingerprint
from rayft.data.sources import read, source_name
from rayft.errors import UsageError

ROWS = [{"prompt": "one\u2028line", "completion": "1"}, {"prompt": 'two, "quoted"\nlines', "completion": "2"}]


def rows(path: Path | str, **settings: Any) -> list[dict[str, Any]]:
    return [row.values for row in read(Source(path=str(path), **settings))]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(ROWS)
    if kind == "jsonl":
        path.write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", "utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind == "feather":
        pa.feather.write_feather(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "feather", "arrow"])
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    assert rows(write(tmp_path, kind)) == ROWS


def test_saved_dataset_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert rows(tmp_path / "one") == ROWS
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    both.save_to_disk(str(tmp_path / "two"))
    assert rows(tmp_path / "two") == ROWS
    assert rows(tmp_path / "two", split="test") == ROWS[:1]


def test_folder_glob_and_uri(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/deep/3.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "a/notes.md").write_text("not data")

    def texts(path: str) -> list[str]:
        return [row["text"] for row in rows(path)]

    assert texts(str(tmp_path)) == ["a/1.jsonl", "a/deep/3.jsonl", "b/2.jsonl"]
    assert texts(f"{tmp_path}/*/*.jsonl") == ["a/1.jsonl", "b/2.jsonl"]
    assert texts(f"{tmp_path}/**/?.jsonl") == ["a/1.jsonl", "a/deep/3.jsonl", "b/2.jsonl"]
    assert texts(f"file://{tmp_path}/a") == ["a/1.jsonl", "a/deep/3.jsonl"]


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one\n\ntwo\r\n")
    assert rows(tmp_path / "rows.txt") == [{"text": "one"}, {"text": "two"}]


def test_nulls_that_arrow_fills_into_structs_are_dropped(tmp_path: Path) -> None:
    calls = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": 2}}]
    pa.parquet.write_table(pa.Table.from_pylist([{"calls": calls, "id": None}]), tmp_path / "rows.parquet")
    assert rows(tmp_path / "rows.parquet") == [{"calls": calls, "id": None}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"a": 1}\n\n{"a": }\n', r"R204: bad\.jsonl:3: malformed: Expecting value at column 7"),
        ("bad.jsonl", b'{"a": 1}\n{"a": 1\n', r"R204: bad\.jsonl:2: malformed"),
        ("bad.jsonl", b"[1, 2]\n", r"bad\.jsonl:1: malformed: a row must be a JSON object, this is a list"),
        ("bad.jsonl", b'{"a": "\xff"}\n', r"bad\.jsonl: malformed: byte \d+ is not UTF-8"),
        ("bad.json", b'[\n{"a": 1},\n{"a" 2}]', r"bad\.json: malformed: Expecting ':' delimiter at line 3, column 6"),
        ("bad.csv", b"a,b\n1,2\n1\n", r"bad\.csv:3: malformed: not 2 fields"),
        ("bad.csv", b"a,b\n1,2,3\n", r"bad\.csv:2: malformed: not 2 fields"),
        ("bad.parquet", b"PAR1 nothing", r"bad\.parquet: malformed"),
        ("bad.arrow", b"ARROW1 nothing", r"bad\.arrow: malformed"),
        ("bad.jsonl.gz", b"not compressed", r"R201: .*bad\.jsonl\.gz: cannot be read: zlib"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        rows(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/*.jsonl", "./missing"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"R201: .*missing.*: no data file, folder or match"):
        rows(f"{tmp_path}/{name}")


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="R201"):
        rows(tmp_path)


def test_unknown_kind_and_unknown_scheme(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(UsageError, match=r"R202: .*rows\.xlsx: not a kind of file"):
        rows(tmp_path / "rows.xlsx")
    with pytest.raises(UsageError, match="R201: what://bucket"):
        rows("what://bucket/rows.jsonl")


def test_unreachable_hub() -> None:
    with pytest.raises(UsageError, match="R203: nobody/nothing: there is no such file or folder") as raised:
        rows("nobody/nothing")
    assert "give the folder" in str(raised.value)


def test_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    before = fingerprint(Source(path=str(path)))
    assert fingerprint(Source(path=str(tmp_path))) == before
    path.write_text('{"text": "other"}\n')
    assert fingerprint(Source(path=str(path))) != before


def test_names() -> None:
    assert source_name(Source(path="data/orders.jsonl")) == "orders.jsonl"
    assert source_name(Source(path="data/orders.jsonl", name="orders")) == "orders"
