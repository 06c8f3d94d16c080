"""What the driver shows of a sweep: a table on a terminal, lines in a file, and never an error of its own."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from rayft.tune.display import Display
from rayft.tune.objective import Objective
from rayft.tune.pace import Pace, trial_seconds_left
from rayft.tune.rows import TrialRow
from tests.tune.sweeps import sweep, trial

LOSS = [Objective("validation_loss")]


def show(
    stages: Sequence[Sequence[TrialRow] | Exception],
    *,
    terminal: bool = False,
    quiet: bool = False,
    each: Callable[[Display], None] = lambda display: None,
) -> str:
    """What a display prints over these answers of the study, one for each poll."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, height=40, legacy_windows=False)
    display = Display("sweep", LOSS, 4, console, quiet=quiet, interval=0.001, summary_every=0.0)
    stop, waiting = threading.Event(), list(stages)

    def poll() -> Sequence[TrialRow]:
        each(display)
        answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if len(waiting) == 1:
            stop.set()
        if isinstance(answer, Exception):
            raise answer
        return answer

    if quiet:
        stop.set()
    display.run(poll, stop)
    return out.getvalue()


def test_a_line_for_each_trial_that_has_ended() -> None:
    first = trial(0, value=0.5)
    better, worse = trial(1, value=0.4), trial(2, "pruned", 25, value=0.9)
    text = show([[trial(0, "running", 10)], [first], [first, better, worse], [first, better, worse]])
    lines = text.splitlines()
    assert [row.split("  ")[0] for row in lines if row.startswith("trial")] == [
        *("trial 0 complete", "trial 1 complete", "trial 2 pruned")
    ]
    assert [("best so far" in row) for row in lines if row.startswith("trial")] == [True, True, False]
    assert lines[0].startswith("0 of 4 trials: 1 running; ")
    assert lines[-1].startswith("3 of 4 trials: 2 complete, 1 pruned; best validation_loss 0.4 (trial 1)")


def test_a_study_that_does_not_answer_is_said_once() -> None:
    text = show([RuntimeError("dead"), RuntimeError("dead"), [trial(0)], RuntimeError("dead")])
    assert text.count("no news from the sweep: RuntimeError") == 2
    assert "trial 0 complete" in text and text.splitlines()[-1].startswith("1 of 4")


def test_the_table_on_a_terminal() -> None:
    failed = trial(3, "failed", 12, value=None, facts={"reason": "loss is [nan]"})
    text = show([sweep(3, running=3), [trial(0, value=0.5), failed], [trial(0, value=0.5), failed]], terminal=True)
    assert text.count("trial 3 failed: loss is [nan]") == 1
    assert "best validation_loss 0.5 (trial 0)" in text and "★ 0" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_word_in_between(terminal: bool) -> None:
    said: list[Display] = []

    def once(display: Display) -> None:
        if not said:
            said.append(display)
            display.say("out of memory: 4 trials share the pack [from now on]")

    assert "out of memory: 4 trials share the pack [from now on]" in show([[trial(0)]], terminal=terminal, each=once)


def test_quiet_is_silent() -> None:
    assert show([[trial(0)]], quiet=True) == ""


def test_time_left() -> None:
    now = [0.0]
    pace = Pace(total=4, clock=lambda: now[0])
    old = trial(0)
    pace.read([old])
    now[0] = 100.0  # the model is loaded: that says nothing about the pace
    pace.read([old])
    assert pace.seconds_left([old]) is None
    now[0] = 110.0
    rows = [old, trial(1, "running", 200)]
    pace.read(rows)
    # Half a budget took 10 s; half a trial and two whole ones are ahead.
    assert pace.seconds_left(rows) == pytest.approx(50.0)
    rows = [old, trial(1, "pruned", 200)]
    # Those that ended used 3/4 of their budget, so do the two that are ahead.
    assert pace.seconds_left(rows) == pytest.approx(10 / 0.5 * 2 * 0.75)
    assert pace.elapsed == 110.0


def test_time_left_of_one_trial() -> None:
    assert trial_seconds_left(trial(0, "running", 100, seconds=20.0)) == pytest.approx(60.0)
    assert trial_seconds_left(trial(0, "running", 0)) is None
    assert trial_seconds_left(trial(0, "waiting", 100)) is None
