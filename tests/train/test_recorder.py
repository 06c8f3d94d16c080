"""A step stands in metrics.jsonl once, also after retries, a driver's death and a torn last line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.errors import UsageError
from rayft.train.recorder import Recorder
from tests.train.conftest import recorder_in


def recorder(folder: Path) -> Recorder:
    ticks = iter(range(10**6))
    return recorder_in(folder, clock=lambda: float(next(ticks)))


def written(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_arrive_in_the_file(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    record.log({"kind": "train", "step": 1, "tokens": 100, "loss": 2.0})
    record.log({"kind": "train", "step": 2, "tokens": 200, "loss": np.float32(1.5)})
    rows = written(tmp_path)
    assert [list(row)[:3] for row in rows] == [["step", "time", "tokens"]] * 2
    assert [(row["step"], row["tokens"], row["loss"]) for row in rows] == [(1, 100, 2.0), (2, 200, 1.5)]
    assert record.rows() == rows


def test_evaluation_joins_the_row_of_its_step(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    for step in (1, 2):
        record.log({"kind": "train", "step": step, "tokens": 100 * step, "loss": 2.0 / step})
    record.log({"kind": "eval", "step": 2, "validation_loss": 1.25})
    rows = written(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["loss"] == 1.0 and rows[1]["validation_loss"] == 1.25 and rows[1]["tokens"] == 200


def test_a_duplicate_replaces(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    for step in (1, 2, 3):
        record.log({"step": step, "loss": 9.0})
    record.log({"step": 2, "loss": 1.0})
    assert [(row["step"], row["loss"]) for row in written(tmp_path)] == [(1, 9.0), (2, 1.0), (3, 9.0)]


def test_rewind_drops_the_rows_beyond_and_marks_the_restart(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    for step in range(1, 8):
        record.log({"step": step, "loss": float(step)})
    record.rewind(4, "worker 1 died")
    assert [row["step"] for row in written(tmp_path)] == [1, 2, 3, 4]
    for step in range(5, 9):
        record.log({"step": step, "loss": 10.0 * step})
    assert [row["loss"] for row in written(tmp_path)] == [1, 2, 3, 4, 50, 60, 70, 80]
    (restart,) = written(tmp_path, "events.jsonl")
    assert restart["kind"] == "restart" and restart["step"] == 4
    assert restart["lost_steps"] == 3 and restart["reason"] == "worker 1 died"


def test_only_the_first_start_is_no_restart(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    record.started(step=0, attempt=0, workers=2)
    record.log({"step": 1, "loss": 1.0})
    record.started(step=0, attempt=0, workers=3)  # by Ray itself, before there was a checkpoint
    assert record.rows() == []
    record.log({"step": 1, "loss": 1.0})
    record.started(step=0, attempt=1, reason="a worker died", workers=3)
    restarts = [(event["reason"], event["lost_steps"]) for event in record.events() if event["kind"] == "restart"]
    assert restarts == [("another number of workers", 1), ("a worker died", 1)]
    (tmp_path / "new").mkdir()
    unlucky = recorder(tmp_path / "new")
    unlucky.started(step=0, attempt=1, reason="a worker died", workers=2)  # the first attempt never came so far
    assert [event["kind"] for event in unlucky.events()] == ["restart", "started"]


def test_a_new_driver_continues_the_files(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    for step in range(1, 6):
        first.log({"step": step, "loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = recorder(tmp_path)
    second.rewind(3, "the driver died")
    second.log({"step": 4, "loss": 40.0})
    assert [(row["step"], row["loss"]) for row in written(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40.0)]
    assert [event["kind"] for event in second.events()] == ["restart"]
    assert second.events()[0]["lost_steps"] == 2
    third = recorder(tmp_path).snapshot(0)
    assert [row["step"] for row in third["rows"]] == [1, 2, 3, 4]
    assert third["events"] == [] and third["restarts"] == 1


def test_a_torn_line_is_cut_before_the_next_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "tokens": 0}\n{"step": 2, "ti')
    recorder(tmp_path).log({"step": 2, "loss": 1.0})
    assert [row["step"] for row in written(tmp_path)] == [1, 2]


def test_damage_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UsageError, match=r"R630.*metrics\.jsonl, line 2"):
        recorder(tmp_path)


def test_numbers_that_are_none_stay_valid_json(tmp_path: Path) -> None:
    recorder(tmp_path).log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    (row,) = written(tmp_path)
    assert row["loss"] is None and row["grad_norm"] is None


def test_snapshot_gives_what_changed(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    record.log({"step": 1, "loss": 1.0})
    first = record.snapshot(0)
    assert [row["step"] for row in first["rows"]] == [1] and first["step"] == 1
    assert record.snapshot(first["cursor"])["rows"] == []
    record.log({"step": 2, "loss": 1.0})
    record.log({"kind": "eval", "step": 1, "validation_loss": 3.0})
    record.samples(2, [{"prompt": "a", "text": "b"}])
    record.rewind(1, "preempted")
    second = record.snapshot(first["cursor"])
    assert [row["step"] for row in second["rows"]] == [1]
    assert [event["kind"] for event in second["events"]] == ["samples", "restart"]
    assert second["restarts"] == 1 and second["step"] == 1 and not second["stop"]
    pickle.dumps(second)  # it travels from the actor to the driver


def test_stop_flag(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    assert not record.should_stop()
    record.request_stop()
    assert record.should_stop() and record.snapshot(0)["stop"]
