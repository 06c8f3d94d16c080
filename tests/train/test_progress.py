"""What the driver shows: a bar on a terminal, lines in a file, and never an error of its own."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rayft.train.progress import Progress, State, duration, shorten
from rayft.train.recorder import Recorder
from tests.train.conftest import recorder_in


def show(
    actions: list[Callable[[Recorder], None]], folder: Path, *, terminal: bool = False, quiet: bool = False
) -> str:
    """Run a display over a recorder on which one action is done before each poll."""
    ticks = iter(range(10**6))
    recorder = recorder_in(folder, clock=lambda: float(next(ticks)))
    stop = threading.Event()
    waiting = list(actions)

    def poll(since: int) -> dict:
        if waiting:
            waiting.pop(0)(recorder)
        else:
            stop.set()
        return recorder.snapshot(since)

    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140)
    if quiet:
        stop.set()
    Progress(4, console, quiet=quiet, interval=0.001, line_every=0.0).run(poll, stop)
    return out.getvalue()


def train(step: int) -> Callable[[Recorder], None]:
    return lambda recorder: recorder.log(
        {"kind": "train", "step": step, "epoch": step / 4, "loss": 1 / step, "tokens_per_second": 1234.5}
    )


def die(recorder: Recorder) -> None:
    raise RuntimeError("the actor died")


def test_plain_lines(tmp_path: Path) -> None:
    text = show(
        [
            train(1),
            train(2),
            lambda recorder: recorder.log({"kind": "eval", "step": 2, "validation_loss": 0.75}),
            lambda recorder: recorder.samples(2, [{"prompt": "2+2 [bold]", "text": "four", "reference": "4"}]),
            lambda recorder: recorder.rewind(1, "worker 0 died"),
            train(2),
            train(3),
            train(4),
        ],
        tmp_path,
    )
    lines = text.splitlines()
    assert lines[0] == "step 1/4  epoch 0.25  loss 1.0000  1,234 tok/s"
    assert lines[1] == "step 2/4  epoch 0.50  loss 0.5000  1,234 tok/s  ETA 2s"
    assert "validation 0.7500" in lines[2]
    assert "samples at step 2" in text
    assert "asked  2+2 [bold]" in text and "answer  four" in text and "wanted  4" in text
    assert "restart at step 1, 1 step to do again: worker 0 died" in text
    assert lines[-1] == "step 4/4  epoch 1.00  loss 0.2500  validation 0.7500  1,234 tok/s  restarts 1"
    assert "\x1b" not in text


def test_attempts_and_their_failures(tmp_path: Path) -> None:
    def start(attempt: int, size: int) -> Callable[[Recorder], None]:
        facts = {"workers": 2, "dtype": "bf16", "trainable_parameters": 5000, "total_parameters": 90000}
        return lambda recorder: recorder.event("started", attempt=attempt, step=0, micro_batch_size=size, **facts)

    def out_of_memory(rank: int) -> Callable[[Recorder], None]:
        return lambda recorder: recorder.event("failure", cause="oom", step=1, detail="tried 3 GB", rank=rank)

    text = show([start(0, 8), train(1), out_of_memory(1), out_of_memory(0), start(1, 4)], tmp_path)
    assert "\n2 workers, 8 examples at a time in bf16, 5,000 of 90,000 parameters trained" in "\n" + text
    assert text.count("out of memory at step 1: tried 3 GB") == 1
    assert "attempt 2: 2 workers, 4 examples" in text


def test_last_line_always_comes(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    stop = threading.Event()
    out = io.StringIO()
    progress = Progress(2, Console(file=out, width=140), interval=0.01, line_every=3600)
    thread = threading.Thread(target=progress.run, args=(recorder.snapshot, stop))
    thread.start()
    for step in (1, 2):
        recorder.log({"step": step, "loss": 1.0})
    stop.set()
    thread.join(10)
    assert out.getvalue().splitlines()[-1].startswith("step 2/2")


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    actions = [train(1), lambda recorder: recorder.samples(1, [{"prompt": "p", "text": "t"}]), train(4)]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show(actions, tmp_path, terminal=True))
    assert "━" in text and "step 4/4  epoch 1.00  loss 0.2500" in text and "samples at step 1" in text


def test_quiet(tmp_path: Path) -> None:
    assert show([train(1)], tmp_path, quiet=True) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_dead_recorder_is_said_once_and_ends_nothing(tmp_path: Path, terminal: bool) -> None:
    text = show([train(1), die, die, die, train(2)], tmp_path, terminal=terminal)
    assert text.count("no news from the run: RuntimeError") == 1
    assert "step 2/4" in text


def test_a_restarted_recorder_is_read_from_its_beginning(tmp_path: Path) -> None:
    first = recorder_in(tmp_path)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 1.0})
        first.log({"step": step, "loss": 1.0})
    progress = Progress(4, Console(file=io.StringIO()))
    progress._poll(first.snapshot)
    second = recorder_in(tmp_path)
    second.log({"step": 4, "loss": 0.125})
    progress._poll(second.snapshot)
    assert progress._state.latest["loss"] == 0.125 and progress._state.step == 4


def test_a_warning_without_a_step(tmp_path: Path) -> None:
    text = show([lambda recorder: recorder.event("warning", kind_of="checkpoint", evidence="damaged")], tmp_path)
    assert "warning: damaged" in text


def test_an_evaluation_does_not_begin_the_pace_anew() -> None:
    state = State(10)
    snapshot = {"restarts": 0, "events": [], "step": 2}
    rows = [{"step": 1, "time": 0.0}, {"step": 2, "time": 5.0}, {"step": 2, "time": 5.0, "validation_loss": 1.0}]
    state.read(snapshot | {"rows": rows})
    assert state.seconds_left() == 40.0


def test_nan_is_shown(tmp_path: Path) -> None:
    assert "loss nan" in show([lambda recorder: recorder.log({"step": 1, "loss": float("nan")})], tmp_path)


def test_time_left_is_measured_since_the_restart() -> None:
    state = State(100)
    rows = [{"step": step, "time": 1.0 * step} for step in range(1, 11)]
    state.read({"cursor": 1, "step": 10, "rows": rows, "events": [], "restarts": 0, "stop": False})
    assert state.seconds_left() == pytest.approx(90)
    rows = [{"step": step, "time": 1000 + 3.0 * step} for step in range(6, 11)]
    state.read({"cursor": 2, "step": 10, "rows": rows, "events": [], "restarts": 1, "stop": False})
    assert state.seconds_left() == pytest.approx(270)


def test_words() -> None:
    assert [duration(s) for s in (0.4, 59.6, 200, 7500, 273600)] == ["0s", "1m00s", "3m20s", "2h05m", "3d04h"]
    assert shorten("a\n b") == "a b" and len(shorten("x" * 500)) <= 160
