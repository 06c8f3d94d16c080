"""How fast a run is and where its time goes: tokens, waiting for data, time in our own callback, memory, MFU."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""Dense bf16 FLOP/s from the makers' data sheets; the first name found in the device's name as whole words counts."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device such as "NVIDIA H100 80GB HBM3", None where we do not know it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def flops_per_token(total: int, trainable: int) -> float:
    """Floating-point operations of one training token: 2 per weight forward, 2 for the gradient of the activations,
    2 for that of the trainable weights; 6 * N when all are trained (PaLM, arXiv 2204.02311, appendix B).

    The products inside attention are left out, so an MFU from it is slightly too low for long sequences.
    """
    return 4.0 * total + 2.0 * trainable


@dataclass
class _Step:
    """Counts and seconds of one optimiser step (or of many, added up)."""

    tokens: int = 0
    padding: int = 0
    supervised: int = 0
    seconds: float = 0.0
    data: float = 0.0
    report: float = 0.0
    away: float = 0.0

    def add(self, other: _Step) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Speed:
    """Clock and counters of one worker; the trainer calls it around its own steps.

        speed = Speed(flops_per_token=flops_per_token(total, trainable))
        with speed.data(): batch = next(batches)
        with speed.report(): ...      # our callback: logging, checkpoints, reporting
        with speed.pause(): ...       # evaluation: not training time at all
        speed.step(tokens=..., padding=..., supervised=...)
        row |= speed.scalars()

    Give `step` the counts of the whole cluster and `devices` the number of workers, and rates are the cluster's.
    """

    def __init__(
        self,
        *,
        device: Any = None,
        devices: int = 1,
        flops_per_token: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`device` is this worker's torch device or None; `window` the optimiser steps over which rates are taken."""
        self._device = device
        self._flops = flops_per_token
        self._peak = _device_peak(device)
        self._devices = devices
        self._clock = clock
        self._recent: deque[_Step] = deque(maxlen=window)
        self._total = _Step()
        self._current = _Step()
        self._inside = False
        self._mark = clock()

    def data(self) -> AbstractContextManager[None]:
        """Time waiting for the next batch."""
        return self._timed("data")

    def report(self) -> AbstractContextManager[None]:
        """Time inside our own callback and in `ray.train.report`."""
        return self._timed("report")

    def pause(self) -> AbstractContextManager[None]:
        """Time that is not training, such as an evaluation: it counts nowhere."""
        return self._timed("away")

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to a part of the current step; inside another such block they belong to that."""
        if self._inside:
            yield
            return
        self._inside = True
        begin = self._clock()
        try:
            yield
        finally:
            self._inside = False
            setattr(self._current, part, getattr(self._current, part) + self._clock() - begin)

    def step(self, *, tokens: int, padding: int = 0, supervised: int = 0) -> None:
        """An optimiser step has ended; `tokens` are the real ones, without padding."""
        now = self._clock()
        self._current.seconds = max(0.0, now - self._mark - self._current.away)
        self._current.tokens, self._current.padding, self._current.supervised = tokens, padding, supervised
        self._recent.append(self._current)
        self._total.add(self._current)
        self._current, self._mark = _Step(), now

    def scalars(self) -> dict[str, float]:
        """For the log row. Counts are since the run's first step, rates and shares over the window.

        tokens, padding_tokens, supervised_tokens: counts. tokens_per_second, supervised_tokens_per_second: real tokens.
        seconds_per_step. padding_share, data_share, report_share: 0..1. peak_memory_gb: resident memory of this
        process, device_memory_gb: allocated on its accelerator (both the highest so far, in 1e9 bytes). mfu: 0..1, on
        devices of PEAK_FLOPS only.
        """
        recent = _Step()
        for step in self._recent:
            recent.add(step)
        seconds = max(recent.seconds, 1e-9)
        found: dict[str, float] = {
            "tokens": self._total.tokens,
            "padding_tokens": self._total.padding,
            "supervised_tokens": self._total.supervised,
            "tokens_per_second": recent.tokens / seconds,
            "supervised_tokens_per_second": recent.supervised / seconds,
            "seconds_per_step": recent.seconds / max(1, len(self._recent)),
            "padding_share": recent.padding / max(1, recent.tokens + recent.padding),
            "data_share": recent.data / seconds,
            "report_share": recent.report / seconds,
            "peak_memory_gb": peak_process_memory() / 1e9,
        }
        if _is_cuda(self._device):
            import torch

            found["device_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        if self._flops and self._peak:
            found["mfu"] = found["tokens_per_second"] * self._flops / (self._peak * self._devices)
        return found

    def totals(self) -> dict[str, float]:
        """Counts and seconds since the run's first step: tokens, padding, supervised, seconds (without `away`), data,
        report, away."""
        return {field.name: getattr(self._total, field.name) for field in fields(self._total)}

    def state(self) -> dict[str, float]:
        """Plain JSON data for the checkpoint, so that counts go on after a resume."""
        return self.totals()

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state()`; the clock starts anew."""
        self._total = _Step(**state)  # type: ignore[arg-type] # JSON gives whole numbers back as int
        self._recent.clear()
        self._current, self._mark = _Step(), self._clock()


def peak_process_memory() -> int:
    """Highest resident memory of this process so far, in bytes.

    Linux keeps it per address space in VmHWM; `ru_maxrss` would carry over the parent's peak through fork and exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _device_peak(device: Any) -> float | None:
    if not _is_cuda(device):
        return None
    import torch

    return peak_flops(torch.cuda.get_device_name(device))
