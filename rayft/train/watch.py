"""Watch over a run's stability: is the loss a number, does it explode, does it move at all.

A pure, deterministic detector: it is fed the global loss and gradient norm of each optimiser step and answers with a
verdict. What is done about it (`train.on_divergence`) is decided by the caller. Its state is plain JSON that goes into
every checkpoint, so a resumed run judges exactly as the uninterrupted one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Any, Literal

VerdictKind = Literal["none", "nan", "explosion", "stagnation"]


@dataclass(frozen=True)
class Limits:
    """When the watch raises its voice. The defaults stay silent on healthy runs with small, noisy batches."""

    window: int = 50
    """Steps of the running medians and of the gradient-norm statistics."""
    warmup: int = 10
    """Steps before an explosion can be told from a start."""
    patience: int = 5
    """Steps in a row that must all be too high."""
    deviations: float = 6.0
    """Robust standard deviations (1.4826 * MAD) above the running median that count as too high."""
    growth: float = 2.0
    """And at least this multiple of the running median and of the lowest one so far."""
    above_start: float = 1.25
    """And at least this multiple of the first steps' median: worse than before anything was learned."""
    gradient_growth: float = 10.0
    """A gradient norm of this multiple of its running median counts as a spike, if the loss rises with it."""
    overflows: int = 0
    """Gradients in a row that may be inf or NaN: the fp16 loss scaler skips such steps and halves its scale."""
    stagnation_window: int = 200
    """Steps whose second half must be better than the first; judged each half window."""
    stagnation_gain: float = 0.01
    """Relative gain below which nothing was learned. A run whose loss has halved since the start did learn."""

    @classmethod
    def for_run(cls, total_steps: int, fp16: bool = False) -> Limits:
        """A quarter of the run (50 to 1000 steps) must show a gain; fp16 may overflow while its scale settles."""
        return cls(stagnation_window=min(max(50, total_steps // 4), 1000), overflows=20 if fp16 else 0)


@dataclass(frozen=True)
class Verdict:
    """What the watch says after a step; `evidence` is a sentence with the numbers, empty when all is well."""

    kind: VerdictKind
    step: int
    evidence: str = ""

    @property
    def diverged(self) -> bool:
        """NaN or explosion: `train.on_divergence` applies. Stagnation is only worth a warning."""
        return self.kind in ("nan", "explosion")


class Watch:
    """Feed `update` once per optimiser step. A symptom is reported when it begins, not at every step that it lasts."""

    def __init__(self, limits: Limits | None = None, max_grad_norm: float = 0.0) -> None:
        """`max_grad_norm` (0 = no clipping) is needed for the share of clipped steps only."""
        self.limits = limits or Limits()
        self.max_grad_norm = max_grad_norm
        self._losses: deque[float] = deque(maxlen=self.limits.window + self.limits.patience)
        self._norms: deque[float] = deque(maxlen=self.limits.window + self.limits.patience)
        self._long: deque[float] = deque(maxlen=self.limits.stagnation_window)
        self._first: list[float] = []
        self._lowest = math.inf
        self._peak_rate = 0.0
        self._overflows = 0
        self._ongoing: dict[str, bool] = {"nan": False, "explosion": False}

    def update(
        self, step: int, loss: float, grad_norm: float | None = None, learning_rate: float | None = None
    ) -> Verdict:
        """Judge one step.

        `loss` is the global mean loss, `grad_norm` the norm before clipping, `learning_rate` that of the step; where
        the rate has fallen below a tenth of its peak a flat loss is expected and does not count as stagnation.
        """
        broken = self._once("nan", step, self._broken(loss, grad_norm))
        if self._ongoing["nan"]:
            return broken
        self._losses.append(loss)
        if grad_norm is not None and math.isfinite(grad_norm):
            self._norms.append(grad_norm)
        if len(self._first) < self.limits.warmup:
            self._first.append(loss)
        exploded = self._once("explosion", step, self._explosion())
        if self._ongoing["explosion"]:
            self._long.clear()
            return exploded
        flat = self._stagnation(loss, learning_rate)
        return Verdict("stagnation", step, flat) if flat else exploded

    def statistics(self) -> dict[str, float]:
        """Gradient norms before clipping over the last `window` steps: mean, 95th percentile, maximum, and the share
        (0..1) that was clipped."""
        norms = sorted(list(self._norms)[-self.limits.window :])
        if not norms:
            return {}
        found = {
            "grad_norm_mean": fmean(norms),
            "grad_norm_p95": norms[math.ceil(0.95 * len(norms)) - 1],
            "grad_norm_max": norms[-1],
        }
        if self.max_grad_norm:
            found["grad_norm_clipped"] = sum(norm > self.max_grad_norm for norm in norms) / len(norms)
        return found

    def state(self) -> dict[str, Any]:
        """Plain JSON data; `load` of it continues exactly."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "long": list(self._long),
            "first": list(self._first),
            "lowest": None if math.isinf(self._lowest) else self._lowest,
            "peak_rate": self._peak_rate,
            "overflows": self._overflows,
            "ongoing": dict(self._ongoing),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        for queue, name in ((self._losses, "losses"), (self._norms, "norms"), (self._long, "long")):
            queue.clear()
            queue.extend(state[name])
        self._first = list(state["first"])
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
        self._peak_rate = state["peak_rate"]
        self._overflows = state["overflows"]
        self._ongoing = dict(state["ongoing"])

    def _once(self, kind: Literal["nan", "explosion"], step: int, evidence: str) -> Verdict:
        new = bool(evidence) and not self._ongoing[kind]
        self._ongoing[kind] = bool(evidence)
        return Verdict(kind, step, evidence) if new else Verdict("none", step)

    def _broken(self, loss: float, grad_norm: float | None) -> str:
        """Evidence of a loss or gradient that is no number, or ""."""
        if grad_norm is not None:
            self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        if not math.isfinite(loss):
            return f"the loss is {loss}{self._before()}"
        if self._overflows > self.limits.overflows:
            times = f" for {self._overflows} steps in a row" if self.limits.overflows else ""
            return f"the gradient norm is {grad_norm}{times} at a loss of {loss:.4g}{self._before()}"
        return ""

    def _before(self) -> str:
        recent = list(self._losses)[-self.limits.patience :]
        return f"; the losses before it were {', '.join(f'{loss:.4g}' for loss in recent)}" if recent else ""

    def _explosion(self) -> str:
        """Evidence that the last `patience` steps are all far too high, or ""."""
        limits = self.limits
        losses = list(self._losses)
        earlier, recent = losses[: -limits.patience], losses[-limits.patience :]
        if len(earlier) < limits.warmup:
            return ""
        middle, start = median(earlier), median(self._first)
        # The lowest running median keeps a slow climb visible, which the running median itself would follow.
        self._lowest = min(self._lowest, middle)
        spread = max(1.4826 * median(abs(loss - middle) for loss in earlier), 0.01 * abs(middle))
        level = min(recent)
        too_high = max(
            self._lowest + limits.deviations * spread, limits.growth * self._lowest, limits.above_start * start
        )
        # An explosion lasts until the loss is back, although the window soon knows nothing else.
        if level > too_high or (self._ongoing["explosion"] and level > limits.above_start * start):
            return (
                f"{limits.patience} steps in a row have a loss of at least {level:.4g}; "
                f"the run began at {start:.4g} and had come down to {self._lowest:.4g}"
            )
        norms = list(self._norms)
        quiet, loud = norms[: -limits.patience], norms[-limits.patience :]
        if len(quiet) < limits.warmup:
            return ""
        usual = median(quiet)
        rising = level > max(middle + limits.deviations / 2 * spread, 1.25 * middle, 0.5 * start)
        if rising and min(loud) > limits.gradient_growth * usual > 0:
            return (
                f"the gradient norm was at least {min(loud):.4g} for {limits.patience} steps, usually {usual:.4g}, "
                f"while the loss rose from {middle:.4g} to {level:.4g} and more"
            )
        return ""

    def _stagnation(self, loss: float, learning_rate: float | None) -> str:
        """Evidence that a whole window of steps taught nothing, or ""."""
        limits = self.limits
        if learning_rate is not None:
            self._peak_rate = max(self._peak_rate, learning_rate)
            if learning_rate <= 0.1 * self._peak_rate:  # also 0: nothing can move
                self._long.clear()
                return ""
        self._long.append(loss)
        if len(self._long) < limits.stagnation_window:
            return ""
        values = list(self._long)
        before, after = values[: len(values) // 2], values[len(values) // 2 :]
        self._long = deque(after, maxlen=limits.stagnation_window)
        gain = fmean(before) - fmean(after)
        noise = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
        start = median(self._first)
        learned = fmean(after) < 0.5 * start
        if learned or gain > limits.stagnation_gain * abs(fmean(before)) or gain > 2 * noise:
            return ""
        self._long.clear()
        return (
            f"the mean loss of the last {len(after)} steps is {fmean(after):.4g}, "
            f"of the {len(before)} before {fmean(before):.4g}, at the start {start:.4g}"
        )
