"""A step stands in metrics.jsonl once, after a retry, a crash and in a bucket too."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.runs.lines import read_lines
from rayft.runs.metrics import MetricsLog
from rayft.runs.storage import locate


def test_rows_of_a_step_are_one(tmp_path: Path) -> None:
    log = MetricsLog(locate(tmp_path / "metrics.jsonl"), tmp_path)
    log.append({"step": 1, "loss": 2.0})
    log.append({"step": 2, "loss": 1.5})
    log.append({"step": 2, "validation_loss": 1.7})
    rows = read_lines(locate(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0), (2, 1.5)]
    assert rows[1]["validation_loss"] == 1.7 and list(rows[0])[:2] == ["step", "time"]


def test_retry_from_a_checkpoint_counts_no_step_twice(tmp_path: Path) -> None:
    log = MetricsLog(locate(tmp_path / "metrics.jsonl"), tmp_path)
    for step in range(1, 8):
        log.append({"step": step, "try": 1})
    log = MetricsLog(locate(tmp_path / "metrics.jsonl"), tmp_path)
    log.rewind(5)
    for step in range(6, 9):
        log.append({"step": step, "try": 2})
    rows = read_lines(locate(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["try"]) for row in rows] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 2),
        (7, 2),
        (8, 2),
    ]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in read_lines(locate(file))] == [1]
    log = MetricsLog(locate(file), tmp_path)
    log.append({"step": 2, "loss": 0.5})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_nan_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(locate(tmp_path / "metrics.jsonl"), tmp_path)
    log.append({"step": 1, "loss": float("nan"), "gradient_norm": float("inf")})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] is None and row["gradient_norm"] is None


def test_a_bucket_gets_whole_files_and_gives_them_back(tmp_path: Path) -> None:
    target = locate(f"memory://{uuid.uuid4().hex}/run") / "metrics.jsonl"
    target.parent.make_folder()
    log = MetricsLog(target, tmp_path / "one machine")
    (tmp_path / "one machine").mkdir()
    log.append({"step": 1, "loss": 1.0})
    log.flush()
    assert [row["step"] for row in read_lines(target)] == [1]
    (tmp_path / "another").mkdir()
    log = MetricsLog(target, tmp_path / "another")
    log.append({"step": 2, "loss": 0.9})
    log.flush()
    assert [row["step"] for row in read_lines(target)] == [1, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=30))
def test_any_history_of_appends_and_rewinds(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[bool, int]]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    log = MetricsLog(locate(folder / "metrics.jsonl"), folder)
    expected: list[int] = []
    for rewind, step in history:
        if rewind:
            log.rewind(step)
            expected = [former for former in expected if former <= step]
        else:
            log.append({"step": step})
            expected = sorted({*expected, step})
    assert [row["step"] for row in read_lines(locate(folder / "metrics.jsonl"))] == expected
