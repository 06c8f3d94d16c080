"""Made-up sweeps for what people look at: losses of a known shape, stopped at rungs as ASHA would."""

from __future__ import annotations

import math
import random
from typing import Any

from rayft.tune.rows import TrialRow

TARGETS = (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear")
RUNGS = (25, 100)
STEPS = 400


def loss(step: int, learning_rate: float, rank: int) -> float:
    """Lowest at 8e-4; the rank hardly matters; above 8e-3 it does not fall."""
    miss = abs(math.log10(learning_rate / 8e-4))
    return 0.4 + 0.25 * miss + 0.02 * abs(math.log2(rank / 16)) / 4 + 2 * math.exp(-step / (30 + 60 * miss))


def trial(number: int, state: str = "complete", step: int = STEPS, **changes: Any) -> TrialRow:
    """One trial of which only what matters is said."""
    values = {"adapter.rank": 8, "train.learning_rate": 1e-3} | changes.pop("values", {})
    value = changes.pop("value", loss(step, values["train.learning_rate"], values["adapter.rank"]))
    fields: dict[str, Any] = {
        "metrics": {} if value is None else {"validation_loss": value},
        "history": () if value is None else ((step, value),),
        "seconds": 0.5 * step,
        "lane": "lane-0",
    }
    return TrialRow(number, values, state, step, STEPS, **(fields | changes))  # type: ignore[arg-type]


def sweep(count: int, *, running: int = 0, failed: tuple[int, ...] = (), seed: int = 0) -> list[TrialRow]:
    """`count` trials, the last `running` of them at work; each rung lets the better half of those so far go on."""
    draw = random.Random(seed)
    rows: list[TrialRow] = []
    reached: dict[int, list[float]] = {rung: [] for rung in RUNGS}
    for number in range(count):
        values: dict[str, Any] = {
            "adapter.rank": draw.choice([4, 8, 16, 32, 64]),
            "adapter.target_modules": draw.choice(TARGETS),
            "adapter.dropout": draw.choice([0.0, 0.05, 0.1]),
            "train.learning_rate": 10 ** draw.uniform(-5, -2),
            "train.lr_scheduler_type": draw.choice(["cosine", "linear", "constant"]),
        }
        if values["train.lr_scheduler_type"] != "constant":
            values["train.warmup_steps"] = round(draw.uniform(0, 0.1), 3)
        noise = draw.gauss(0, 0.02)
        last, state = STEPS, "complete"
        for rung in RUNGS:
            value = loss(rung, values["train.learning_rate"], values["adapter.rank"]) + noise
            reached[rung].append(value)
            if value > sorted(reached[rung])[(len(reached[rung]) - 1) // 2]:
                last, state = rung, "pruned"
                break
        if number >= count - running:
            last, state = draw.randrange(10, 300), "running"
        facts: dict[str, Any] = {
            "tokens_per_second": 400.0 + number,
            "trainable_parameters": 61_440 * values["adapter.rank"],
        }
        if number in failed:
            last, state, facts["reason"] = 12, "failed", "loss is nan at step 12"
        history = tuple(
            (step, loss(step, values["train.learning_rate"], values["adapter.rank"]) + noise)
            for step in range(25, last + 1, 25)
        )
        metrics = {"validation_loss": history[-1][1]} if history and state != "failed" else {}
        metrics |= {"latency_ms": 10.0 + values["adapter.rank"] / 4} if metrics else {}
        rows.append(
            TrialRow(number, values, state, last, STEPS, metrics, facts, history, f"lane-{number % 2}", 0.4 * last)  # type: ignore[arg-type]
        )
    return rows
