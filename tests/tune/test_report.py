"""The report of a sweep: its numbers follow from the trials, and its commands and pictures exist."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from scipy import stats

from rayft.config.recipe import Recipe
from rayft.tune.gallery import draw
from rayft.tune.objective import Objective
from rayft.tune.outcome import Outcome, Speed
from rayft.tune.repeats import Repeat, half_width, overlap
from rayft.tune.report import write_report
from tests.tune.sweeps import sweep, trial

SPACE: dict[str, BaseDistribution] = {
    "adapter.rank": CategoricalDistribution([4, 8, 16, 32, 64]),
    "train.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
}


def recipe(rank: int = 16, learning_rate: float = 1e-5) -> Recipe:
    return Recipe.model_validate(
        {
            "name": f"r{rank}",
            "model": {"base": "smollm2-135m-instruct"},
            "adapter": {"method": "lora", "rank": rank},
            "data": {"train": "orders.jsonl"},
            "train": {"learning_rate": learning_rate, "global_batch_size": 4},
        }
    )


def outcome(**changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "name": "orders-sweep",
        "path": "/runs/orders-sweep",
        "start": recipe(),
        "best": recipe(8, 1e-3),
        "objectives": (Objective("validation_loss"),),
        "rows": (trial(0, value=0.7), trial(1, value=0.5), trial(2, "pruned", 100, value=0.4)),
        "distributions": SPACE,
        "mode": "pack",
        "reason": "every trial is a LoRA adapter on the same base",
    }
    return Outcome(**(fields | changes))


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))


def cells(text: str) -> list[list[str]]:
    """The first Markdown table, its head first; `\\|` is a bar inside a cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == len(rows[0]) for row in rows)
    return [rows[0], *rows[2:]]


def table(text: str) -> list[dict[str, str]]:
    head, *rows = cells(text)
    return [dict(zip(head, row, strict=True)) for row in rows]


def facts(text: str) -> dict[str, str]:
    return {name: value for name, value in cells(text)[1:]}


def test_the_winner_and_what_it_changes() -> None:
    parts = sections(write_report(outcome()))
    assert "Best of 3 trials: trial 1 with validation_loss 0.5." in parts[""]
    changes = re.findall(r"^- `(.+)`$", parts["Best trial"], flags=re.M)
    assert changes == ["adapter.rank: 16 -> 8", "train.learning_rate: 1e-05 -> 0.001"]
    assert [row["trial"] for row in table(parts["Trials"])] == ["1", "0", "2"]
    assert table(parts["Trials"])[0] == {
        "trial": "1",
        "state": "complete",
        "step": "400/400",
        "validation_loss": "0.5",
        "rank": "8",
        "learning_rate": "0.001",
        "time": "3m20s",
    }


def test_how_it_ran() -> None:
    rows = (*outcome().rows, trial(3, facts={"peak_memory_gb": 1.234}), trial(4, facts={"peak_memory_gb": 0.5}))
    settings = {"search": "tpe", "lanes": 2, "a|b": [1, 2]}
    how = facts(sections(write_report(outcome(rows=rows, settings=settings, seconds=125.0)))["How it ran"])
    assert how == {
        "trials": "5 of 5 trials: 4 complete, 1 pruned",
        "mode": "pack: every trial is a LoRA adapter on the same base",
        "objective": "lowest `validation_loss`",
        "search": "tpe",
        "lanes": "2",
        "a|b": "1+2",
        "wall time": "2m05s",
        "training time of all trials": "14m10s",
        "peak memory": "1.23 GB",
    }


def test_examples_saved_by_early_exit() -> None:
    rows = (
        trial(0),
        trial(1, "pruned", 100),
        trial(2, "pruned", 300, values={"train.global_batch_size": 8}),
        trial(3, "failed", 0, value=None),
        trial(4, "running", 10),
    )
    early = sections(write_report(outcome(rows=rows)))["Early exit"]
    # Budgets: 400 steps of 4 examples, once of 8; the running trial does not count.
    whole, pruned, failed = 1600 * 3 + 3200, 300 * 4 + 100 * 8, 1600
    assert cells(early)[1:] == [
        ["pruned", "2", f"{pruned:,}", f"{pruned / whole:.0%}"],
        ["failed", "1", f"{failed:,}", f"{failed / whole:.0%}"],
    ]
    assert f"would have run {whole:,} examples; they ran {whole - pruned - failed:,}." in early
    assert "No trial was stopped: all 1,600 examples were run." in write_report(outcome(rows=rows[:1]))
    assert "Early exit" not in sections(write_report(outcome(rows=rows[4:])))


@pytest.mark.parametrize(("ours", "ratio"), [(800.0, "2.00"), (320.0, "0.80")])
def test_speed(ours: float, ratio: str) -> None:
    text = sections(write_report(outcome(speed=Speed(ours, 400.0, "3 steps of one trial alone"))))["Speed"]
    assert facts(text)["one trial after another (3 steps of one trial alone)"] == "400 tokens/s"
    assert f"{ratio} times as fast" in text
    assert ("tune.execution: classic" in text) == (ours < 400), "a case where sharing does not help is said"


def test_repeats() -> None:
    repeats = (Repeat(1, (0.5, 0.52, 0.6)), Repeat(0, (0.71, 0.69, math.nan)), Repeat(7, (0.55,)))
    text = sections(write_report(outcome(repeats=repeats)))["Repeats with other seeds"]
    rows = table(text)
    assert [row["trial"] for row in rows] == ["1", "0", "7"]
    assert [row["seeds"] for row in rows] == ["3", "2 of 3", "1"]
    mean, half = rows[0]["mean of further seeds, 95% interval"].split(" ± ")
    low, high = stats.t.interval(0.95, 2, loc=0.54, scale=stats.sem([0.5, 0.52, 0.6]))
    assert float(mean) == pytest.approx(0.54) and float(half) == pytest.approx((high - low) / 2, rel=1e-3)
    assert rows[2]["mean of further seeds, 95% interval"] == "0.55", "one value has no interval"
    assert "Trial 1 has the best mean." in text and "cannot be told apart" not in text


def test_the_seeds_may_disagree_with_the_search() -> None:
    repeats = (Repeat(1, (0.6, 0.8, 0.7)), Repeat(0, (0.61, 0.62, 0.6)))
    text = sections(write_report(outcome(repeats=repeats)))["Repeats with other seeds"]
    assert "Trial 0 has the best mean. Its interval overlaps that of trial 1" in text
    apart = (Repeat(1, (0.1, 0.11, 0.1)), Repeat(0, (0.61, 0.62, 0.6)))
    assert "lies apart from that of trial 0." in write_report(outcome(repeats=apart))
    higher = outcome(repeats=apart, objectives=(Objective("validation_loss", "max"),))
    assert "Trial 0 has the best mean." in write_report(higher)


def test_an_interval_is_scipys() -> None:
    values = [0.31, 0.35, 0.30, 0.42]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=0.345, scale=stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)
    assert half_width([1.0]) is None and overlap(Repeat(0, (1.0,)), Repeat(1, (1.0, 2.0))) is None


def test_failures_events_and_what_to_do_next() -> None:
    rows = (*outcome().rows, trial(3, "failed", 12, value=None, facts={"reason": "loss is nan | step 12\nagain"}))
    text = write_report(outcome(rows=rows, events=("Out of memory: 4 trials share the pack from step 30 on",)))
    parts = sections(text)
    assert table(parts["Failures"]) == [{"trial": "3", "step": "12", "reason": "loss is nan | step 12 again"}]
    assert parts["On the way"].strip() == "- Out of memory: 4 trials share the pack from step 30 on"
    commands = [shlex.split(line, comments=True) for line in parts["Next"].splitlines() if line.startswith("rayft")]
    assert commands == [["rayft", "train", "/runs/orders-sweep/best.yaml"], ["rayft", "evaluate", "run:orders-sweep"]]
    for title in ("Failures", "On the way", "Speed", "Repeats with other seeds"):
        assert title not in sections(write_report(outcome())), "nothing to say, no section"


def test_an_unfinished_sweep_says_how_to_go_on() -> None:
    rows = (trial(0, "waiting", 10), trial(1, "failed", 0, value=None))
    text = write_report(outcome(rows=rows, best=None, path="/my runs/sweep"))
    assert "No trial has a result: 1 of 2 trials: 1 failed, 1 waiting." in text
    assert "rayft tune '/my runs/sweep/recipe.yaml' --resume" in text
    assert "best.yaml" not in text


def test_several_objectives() -> None:
    values = [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0)]
    rows = tuple(trial(n, metrics={"validation_loss": a, "latency_ms": b}) for n, (a, b) in enumerate(values))
    objectives = (Objective("validation_loss"), Objective("latency_ms"))
    parts = sections(write_report(outcome(rows=rows, objectives=objectives)))
    assert "2 of 3 trials are the best trade-offs between validation_loss and latency_ms." in parts[""]
    assert [row["trial"] for row in table(parts["Best trials"])] == ["0", "1"]
    assert "It has the best validation_loss." in parts["Best trials"]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_picture_of_the_report_is_a_file(count: int, tmp_path: Path) -> None:
    swept = outcome(rows=tuple(sweep(count)), rungs=(25, 100))
    for one in (swept, replace(swept, objectives=(*swept.objectives, Objective("latency_ms")))):
        text = write_report(one, draw(one, tmp_path))
        shown = re.findall(r"!\[.+?\]\((.+?)\)", text)
        assert all((tmp_path / name).stat().st_size > 1000 for name in shown)
        wanted = {0: 0, 1: 3, 40: 4}[count] + (count > 0 and len(one.objectives) - 1)
        assert len(shown) == wanted
        assert ("Needs at least 8 trials" in text) == (count == 1)
