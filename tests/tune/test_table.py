"""The table of a sweep fits the screen whatever the number of trials, and shows those that matter."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from rayft.tune.objective import Objective
from rayft.tune.rows import TrialRow
from rayft.tune.table import line, render, summary
from rayft.tune.words import labels, paths_of, shown
from tests.tune.sweeps import sweep, trial

LOSS = [Objective("validation_loss")]
BOTH = [*LOSS, Objective("latency_ms")]


def screen(rows: list[TrialRow], width: int, objectives: list[Objective] = LOSS, total: int = 64) -> list[str]:
    """The lines of the table on a console much wider than it, so that nothing is wrapped or cut by Rich."""
    console = Console(file=io.StringIO(), record=True, width=width + 100)
    console.print(render(rows, objectives, title="sweep", total=total, width=width, elapsed=65, left=130))
    return [text.rstrip() for text in console.export_text().splitlines()]


def trials_on(lines: list[str]) -> list[int]:
    return [int(words[0]) for words in (text.replace("★", " ").split() for text in lines) if words[0].isdigit()]


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("objectives", [LOSS, BOTH])
@pytest.mark.parametrize("count", [1, 2, 13, 40, 300])
def test_it_fits(width: int, objectives: list[Objective], count: int) -> None:
    lines = screen(sweep(count, running=count // 4, failed=(1,)), width, objectives, total=count)
    assert len(lines) <= 20
    assert max(map(len, lines)) <= width


def test_the_best_and_the_running_ones_are_shown() -> None:
    rows = sweep(100, running=6)
    lines = screen(rows, 140)
    best = sorted((row.metrics["validation_loss"], row.number) for row in rows if row.state == "complete")[:3]
    assert {number for _, number in best} | set(range(94, 100)) <= set(trials_on(lines))
    assert [text.split()[1] for text in lines if "★" in text] == [str(best[0][1])]
    assert lines[0].startswith("sweep  94 of 64 trials: ") and lines[0].endswith("6 running")
    assert f"best validation_loss {best[0][0]:.4g} (trial {best[0][1]})  1m05s  ETA 2m10s" == lines[1]
    hidden = 100 - len(trials_on(lines))
    assert lines[-1].startswith(f"and {hidden} more: ")


def test_a_front_has_a_star_for_each_member() -> None:
    values = [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 1.0)]
    rows = [trial(n, metrics={"validation_loss": a, "latency_ms": b}) for n, (a, b) in enumerate(values)]
    lines = screen(rows, 80, BOTH)
    assert "Pareto front: trials 0, 1, 3" in lines[1]
    assert trials_on([text for text in lines if "★" in text]) == [0, 1, 3]


def test_what_has_no_room_is_named_and_what_varies_most_stays() -> None:
    lines = screen(sweep(40, running=8), 80)
    assert "no room for target_modules, lr_scheduler_type" in lines
    assert any("learning_" in text for text in lines[:3]) and "rate" in lines[3]
    assert not any("no room" in text for text in screen(sweep(40, running=8), 140))


def test_time_left_of_a_trial_and_values_that_are_missing() -> None:
    rows = [
        trial(0, "running", 100, seconds=50.0, values={"train.warmup_steps": 0.1}),
        trial(1, "running", 0, value=None),
        trial(2, value=math.nan),
    ]
    text = [" ".join(row.split()) for row in screen(rows, 140)]
    assert text[-3].startswith("0 0.1 100/400") and text[-3].endswith("running 2m30s")
    assert text[-2] == "1 - 0/400 - running"
    assert text[-1] == "2 - 400/400 - complete"


def test_before_the_first_trial() -> None:
    assert screen([], 80) == ["sweep  0 of 64 trials", "1m05s  ETA 2m10s"]


def test_lines() -> None:
    rows = [
        trial(0, value=0.5, values={"adapter.target_modules": ["q_proj", "v_proj"]}),
        trial(1, "failed", 12, value=None, facts={"reason": "loss is nan\nat step 12"}),
    ]
    told = line(rows[0], LOSS, list(rows[0].values), best=True)
    assert told == (
        "trial 0 complete  step 400/400  validation_loss 0.5  3m20s  "
        "rank=8 learning_rate=0.001 target_modules=q+v_proj  (best so far)"
    )
    assert line(rows[1], LOSS, [], best=False) == (
        "trial 1 failed  step 12/400  validation_loss -  6s  loss is nan at step 12"
    )
    assert summary(rows, LOSS, 4, 60, None) == (
        "2 of 4 trials: 1 complete, 1 failed; best validation_loss 0.5 (trial 0)  1m00s"
    )


def test_words() -> None:
    assert labels(["adapter.dropout", "train.dropout", "train.seed"]) == {
        "adapter.dropout": "adapter.dropout",
        "train.dropout": "train.dropout",
        "train.seed": "seed",
    }
    assert [shown(value) for value in (8, 3.2e-4, 1e-5, 0.05, True, None, "all-linear")] == [
        *("8", "0.00032", "1e-5", "0.05", "true", "none", "all-linear")
    ]
    assert shown(["q_proj", "v_proj"]) == "q+v_proj" and shown(["lm_head", "q_proj"]) == "lm_head+q_proj"
    assert shown([]) == "none" and shown(["q_proj"]) == "q_proj" and shown({"a": 1.0}) == "a=1"
    same = [trial(0, values={"train.epochs": 2}), trial(1, values={"train.epochs": 2, "adapter.rank": 4})]
    assert paths_of(same) == ["adapter.rank"], "what all trials share tells them apart from nothing"
    assert paths_of(same[:1]) == ["adapter.rank", "train.learning_rate", "train.epochs"]
