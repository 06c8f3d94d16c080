"""The run folder's contract: whose name it is, what resuming may change, and that nothing good is ever lost."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.config import Resolved
from rayft.errors import RunStopped, UsageError
from rayft.runs.checkpoints import name_of, newest_whole
from rayft.runs.folder import RunFolder
from rayft.runs.listing import list_runs, remove_run, show_run
from rayft.runs.manifest import write_manifest
from rayft.runs.storage import Location, locate, write_atomic

Make = Callable[..., Resolved]


def save_checkpoint(run: RunFolder, step: int, tmp_path: Path, name: str | None = None) -> Location:
    """What a training worker does: save locally, write the manifest, upload."""
    local = tmp_path / f"local-{run.name}-{name or step}"
    local.mkdir()
    (local / "weights").write_text(f"weights of step {step}")
    write_manifest(local, step)
    target = run.location / "checkpoints" / (name or f"checkpoint_{step:04d}")
    locate(local).copy_to(target)
    return target


def test_a_new_run_holds_its_record_and_recipe(resolved: Make, storage: str) -> None:
    with RunFolder.create(resolved(), "train", parent="run:other") as run:
        record = run.read_json("run.json")
        assert {
            "schema": 1,
            "name": "demo",
            "verb": "train",
            "state": "running",
            "parent": "run:other",
        }.items() <= record.items()
        assert {"python", "torch", "transformers", "peft", "ray"} <= record["versions"].keys()
        assert run.recipe() == resolved().recipe
        assert b"# user" in (run.location / "recipe.yaml").read()
        run.pin(base="b1", data="d1")
        run.finish("finished", best_step=3)
    again = RunFolder.open(locate(storage) / "demo")
    assert again.state == "finished" and again.record.hashes == {"base": "b1", "data": "d1"}
    assert again.record.facts == {"best_step": 3} and again.record.ended


def test_a_name_in_use_is_refused_and_says_what_to_do(resolved: Make) -> None:
    RunFolder.create(resolved(), "train").finish("failed")
    with pytest.raises(UsageError, match=r"R402.*'demo' is in use.*failed") as caught:
        RunFolder.create(resolved(), "train")
    assert all(option in str(caught.value) for option in ("--resume", "--overwrite", "--new"))


def test_new_takes_the_next_free_name(resolved: Make) -> None:
    names = []
    for _ in range(3):
        with RunFolder.create(resolved(), "train", "new") as run:
            names.append(run.name)
            assert run.location.name == run.name
    assert names == ["demo", "demo-2", "demo-3"]


@pytest.mark.parametrize("mode", ["fail", "resume", "overwrite"])
def test_a_folder_that_is_no_run_is_never_touched(resolved: Make, storage: str, mode: str) -> None:
    folder = locate(storage) / "demo"
    folder.make_folder()
    (folder / "thesis.tex").write(b"precious")
    with pytest.raises(UsageError, match="R403"):
        RunFolder.create(resolved(), "train", mode)  # type: ignore[arg-type]
    assert folder.files() == {"thesis.tex": 8}


def test_resume_goes_on_with_free_changes(resolved: Make, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder.create(resolved(), "train").finish("stopped")
    with caplog.at_level(logging.WARNING):
        run = RunFolder.create(resolved("scale.workers=4", "train.save_steps=5"), "train", "resume")
    assert [str(change) for change in run.changes] == ["train.save_steps: None -> 5.0", "scale.workers: 'auto' -> 4"]
    assert "scale.workers: 'auto' -> 4" in caplog.text
    assert run.state == "running" and len(run.record.resumed) == 1 and run.recipe().scale.workers == 4
    run.finish("finished")


@pytest.mark.parametrize(
    "change",
    [
        "seed=18",
        "train.learning_rate=1e-4",
        "adapter.rank=8",
        "data.max_length=64",
        "train.global_batch_size=4",
        "adapter=null",
    ],
)
def test_resume_refuses_another_computation(resolved: Make, change: str) -> None:
    RunFolder.create(resolved(), "train").finish("stopped")
    with pytest.raises(UsageError, match="R404") as caught:
        RunFolder.create(resolved(change, "scale.workers=4"), "train", "resume")
    assert change.split("=")[0] in caught.value.message and "scale.workers" not in caught.value.message


def test_resume_of_a_finished_run_leaves_it_finished(resolved: Make) -> None:
    RunFolder.create(resolved(), "train").finish("finished")
    with RunFolder.create(resolved(), "train", "resume") as run:
        assert run.state == "finished"


def test_resume_without_a_run_begins_one(resolved: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), RunFolder.create(resolved(), "train", "resume") as run:
        assert run.state == "running"
    assert "no run 'demo'" in caplog.text


def test_a_resumed_run_insists_on_its_inputs(resolved: Make) -> None:
    with RunFolder.create(resolved(), "train") as run:
        run.pin(data="one")
        run.finish("stopped")
    with RunFolder.create(resolved(), "train", "resume") as run:
        run.pin(data="one")
        with pytest.raises(UsageError, match=r"R407.*data"):
            run.pin(data="two")


def test_an_error_marks_the_run(resolved: Make, storage: str) -> None:
    for error, state in ((ValueError("boom"), "failed"), (RunStopped("R601", "stopped"), "stopped")):
        with pytest.raises(type(error)), RunFolder.create(resolved(), "train", "new") as run:
            raise error
        again = RunFolder.open(run.path)
        assert again.state == state and again.record.facts["error"]


def test_overwrite_keeps_the_old_run_until_the_first_checkpoint(resolved: Make, storage: str, tmp_path: Path) -> None:
    old = RunFolder.create(resolved(), "train")
    save_checkpoint(old, 10, tmp_path)
    old.finish("finished")
    with RunFolder.create(resolved("seed=99"), "train", "overwrite") as new:
        (aside,) = [run for run in list_runs(storage) if run.state.startswith("set aside")]
        assert list(RunFolder.open(aside.path).checkpoints()) == [10], "an interruption here loses nothing"
        assert new.index_checkpoints() == {} and len(list_runs(storage)) == 2
        save_checkpoint(new, 5, tmp_path)
        assert list(new.index_checkpoints()) == [5]
        assert [run.name for run in list_runs(storage)] == ["demo"] and new.recipe().seed == 99


def test_two_interrupted_overwrites_keep_both(resolved: Make, storage: str, tmp_path: Path) -> None:
    old = RunFolder.create(resolved(), "train")
    save_checkpoint(old, 10, tmp_path)
    old.finish("finished")
    for _ in range(2):
        run = RunFolder.create(resolved(), "train", "overwrite")
        run.release()
    kept = [run for run in list_runs(storage) if run.state.startswith("set aside")]
    assert len(kept) == 2 and any(RunFolder.open(aside.path).checkpoints() for aside in kept)
    save_checkpoint(run, 1, tmp_path)
    run.index_checkpoints()
    assert [kept.path for kept in list_runs(storage)] == [run.path], "the first checkpoint frees them all"


def test_checkpoints_are_indexed_when_complete(resolved: Make, tmp_path: Path) -> None:
    with RunFolder.create(resolved(), "train") as run:
        save_checkpoint(run, 20, tmp_path)
        save_checkpoint(run, 10, tmp_path)
        unfinished = run.location / "checkpoints" / "checkpoint_0030"
        unfinished.make_folder()
        (unfinished / "weights").write(b"no manifest yet")
        assert list(run.index_checkpoints()) == [10, 20]
        assert run.read_json("checkpoints/steps.json") == {"10": "checkpoint_0010", "20": "checkpoint_0020"}


def test_a_damaged_checkpoint_is_passed_over_and_said(resolved: Make, tmp_path: Path) -> None:
    with RunFolder.create(resolved(), "train") as run:
        folders = {step: save_checkpoint(run, step, tmp_path) for step in (10, 20, 30)}
        (folders[30] / "weights").write(b"weigh")
        flipped = (folders[20] / "weights").read().replace(b"20", b"21")
        (folders[20] / "weights").write(flipped)
        found, damaged = newest_whole(folders.values())
    assert found == folders[10]
    assert "checkpoint_0030" in damaged[0] and "5 of 18 bytes" in damaged[0] and "checkpoint_0020" in damaged[1]
    assert newest_whole(folders.values(), lambda folder: folder != folders[10])[0] is None


def test_of_two_checkpoints_of_a_step_the_later_attempt_counts_unless_damaged(resolved: Make, tmp_path: Path) -> None:
    with RunFolder.create(resolved(), "train") as run:
        saved = [save_checkpoint(run, 10, tmp_path, name_of(10, attempt)) for attempt in (2, 9, 10)]
        assert run.checkpoints() == {10: str(saved[2])} and newest_whole(saved)[0] == saved[2]
        (saved[2] / "weights").write(b"weights of step 99")
        assert newest_whole(saved)[0] == saved[1]


def test_metrics_survive_a_resume(resolved: Make) -> None:
    with RunFolder.create(resolved(), "train") as run:
        for step in (1, 2, 3):
            run.append_metrics({"step": step, "loss": 1.0 / step})
        run.finish("stopped")
    with RunFolder.create(resolved(), "train", "resume") as run:
        run.metrics_log().rewind(2)
        run.append_metrics({"step": 3, "loss": 0.3})
        run.finish("finished")
    rows = RunFolder.open(run.path).metrics()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.3)]


def test_show_and_remove(resolved: Make, storage: str, tmp_path: Path) -> None:
    run = RunFolder.create(resolved(), "train")
    save_checkpoint(run, 4, tmp_path)
    run.append_metrics({"step": 4, "loss": 0.5})
    with run.writing("adapter") as folder:
        (folder / "adapter_config.json").write_text("{}")
    run.finish("finished")
    shown = show_run("run:demo", storage)
    assert (
        shown["state"] == "finished"
        and list(shown["checkpoints"]) == ["4"]
        and shown["result"] == str(locate(storage) / "demo" / "adapter")
    )
    assert json.dumps(shown)
    assert remove_run("demo", storage) == run.path
    assert list_runs(storage) == [] and not (locate(storage) / "demo").exists()


def test_a_damaged_run_does_not_hide_the_others(resolved: Make, storage: str) -> None:
    with RunFolder.create(resolved(), "train") as run:
        run.finish("finished")
    write_atomic(locate(storage) / "newer" / "run.json", '{"schema": 99, "name": "newer", "verb": "train"}')
    assert {run.name: run.state for run in list_runs(storage)} == {"demo": "finished", "newer": "unreadable (R416)"}


def test_rm_touches_only_runs(storage: str) -> None:
    folder = locate(storage) / "photos"
    folder.make_folder()
    (folder / "a.jpg").write(b"1")
    with pytest.raises(UsageError, match="R410"):
        remove_run("photos", storage)
    assert folder.files() == {"a.jpg": 1}


HOLDER = """
import sys, time
from rayft.config import load
from rayft.runs.folder import RunFolder
run = RunFolder.create(load(sys.argv[1]), "train", sys.argv[2])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_a_run_in_use_is_left_alone_and_a_killed_one_can_be_resumed(
    resolved: Make, tmp_path: Path, storage: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_atomic(recipe, resolved().to_yaml())
    command = [sys.executable, "-c", HOLDER, str(recipe), "fail"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for mode in ("resume", "overwrite"):
        with pytest.raises(UsageError, match="R406"):
            RunFolder.create(resolved(), "train", mode)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="R406"):
        remove_run("demo", storage)
    assert [run.state for run in list_runs(storage)] == ["running"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [run.state for run in list_runs(storage)] == ["interrupted"]
    with RunFolder.create(resolved(), "train", "resume") as run:
        assert run.state == "running"
        run.finish("finished")


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_only_one_of_two_processes_gets_a_name(resolved: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_atomic(recipe, resolved().to_yaml())
    race = HOLDER.replace("time.sleep(60)", "sys.stdin.readline()")
    command = [sys.executable, "-c", race, str(recipe), "fail"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **streams) for _ in range(3)]  # type: ignore[call-overload]
    outputs = [process.communicate("\n") for process in processes]
    assert sum(out == "ready\n" for out, _ in outputs) == 1
    assert sum("R402" in err for _, err in outputs) == 2
