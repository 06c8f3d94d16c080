"""The sweep as an experiment of Ray Tune: `ResultGrid`, `ExperimentAnalysis` and TensorBoard read its folder.

In a pack many trials share one of Tune's, so Tune itself would know lanes and not trials. Files and names are those of
Ray 2.60: `experiment_state-*.json`, and per trial `params.json`, `result.json`, `progress.csv` and `error.txt`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune import Checkpoint, ExperimentAnalysis, ResultGrid
from ray.tune.experiment import Trial
from ray.tune.utils import flatten_dict
from ray.tune.utils.serialization import TuneFunctionEncoder

from rayft.runs.storage import Location, locate, write_atomic
from rayft.tune.rows import State, TrialRow

FOLDER = "tune"
"""In the run folder."""
STATUS: dict[State, str] = {
    "waiting": Trial.PENDING,
    "running": Trial.RUNNING,
    "complete": Trial.TERMINATED,
    "pruned": Trial.TERMINATED,
    "failed": Trial.ERROR,
}


def write(run: str, rows: Sequence[TrialRow], log: Iterable[Mapping[str, Any]]) -> str:
    """Write every trial of a run into `<run>/tune`, which is returned; what stood there is replaced file by file.

    rows: from the study; log: rows of its `metrics.jsonl`, for all scalars of each report.
    """
    experiment = locate(run) / FOLDER
    context = StorageContext(storage_path=run, experiment_dir_name=FOLDER)
    log = list(log)
    trials = []
    for row in rows:
        results = [_result(row, number, entry) for number, entry in enumerate(_reports(log, row.number), start=1)]
        if results:
            results[-1] |= {**flatten_dict(dict(row.metrics)), "done": row.ended, "state": row.state}
        folder = experiment / f"trial-{row.number:05d}"
        _write_files(folder, row, results)
        trials.append(_trial(row, results, context, folder.name, locate(run) / "trials" / str(row.number) / "adapter"))
    state = {
        "trial_data": [trial.get_json_state() for trial in trials],
        "runner_data": {},
        "stats": {"start_time": datetime.now().timestamp()},
    }
    # One name for good: of several snapshots Ray's reader takes the one with the greatest name.
    write_atomic(experiment / "experiment_state-0.json", json.dumps(state, cls=TuneFunctionEncoder))
    return str(experiment)


def read(run: str, metric: str, mode: str) -> ResultGrid:
    """The trials of a run as Tune's result."""
    place = locate(run) / FOLDER
    analysis = ExperimentAnalysis(
        place.path, storage_filesystem=place.filesystem, default_metric=metric, default_mode=mode
    )
    return ResultGrid(analysis)


def _reports(log: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    return [entry for entry in log if entry["trial"] == number and entry["event"] == "report"]


def _result(row: TrialRow, iteration: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One line of result.json."""
    hidden = ("trial", "event", "stop", "time", "trial_step")
    scalars = {name: value for name, value in entry.items() if name not in hidden}
    return scalars | {
        "step": entry["trial_step"],
        "training_iteration": iteration,
        "timestamp": round(entry["time"]),
        "trial_id": f"{row.number:05d}",
        "done": False,
        "config": dict(row.values),
    }


def _write_files(folder: Location, row: TrialRow, results: Sequence[dict[str, Any]]) -> None:
    write_atomic(folder / "params.json", json.dumps(dict(row.values), indent=2, sort_keys=True))
    write_atomic(folder / "result.json", "".join(json.dumps(result) + "\n" for result in results))
    flat = [flatten_dict(result, delimiter="/") for result in results]
    table = io.StringIO()
    names = list(dict.fromkeys(name for result in flat for name in result))
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(flat)
    write_atomic(folder / "progress.csv", table.getvalue())
    if row.state == "failed":
        write_atomic(folder / "error.txt", f"{row.facts.get('reason', 'failed')}\n")


def _trial(
    row: TrialRow, results: Sequence[dict[str, Any]], context: StorageContext, name: str, adapter: Location
) -> Trial:
    trial = Trial(
        "rayft",
        stub=True,
        trial_id=f"{row.number:05d}",
        config=dict(row.values),
        evaluated_params=dict(row.values),
        storage=context,
    )
    trial.relative_logdir = trial.storage.trial_dir_name = name
    trial.create_placement_group_factory()
    for result in results:
        trial.update_last_result({**result, **_facts(row)} if result is results[-1] else dict(result))
    if row.state == "failed":
        trial.run_metadata.error_filename = "error.txt"
    if results and adapter.exists():
        checkpoint = Checkpoint(adapter.path, adapter.filesystem)
        trial.run_metadata.checkpoint_manager.register_checkpoint(_TrainingResult(checkpoint, dict(results[-1])))
    trial.set_status(STATUS[row.state])
    return trial


def _facts(row: TrialRow) -> dict[str, Any]:
    return {name: value for name, value in row.facts.items() if isinstance(value, int | float | str)}
