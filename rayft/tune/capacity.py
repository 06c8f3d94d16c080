"""How many adapters a pack holds: it grows while that pays and memory lasts, and shrinks when memory ran out."""

from __future__ import annotations

GAIN = 1.05
"""Throughput of twice as many adapters over that of half of them, below which growing ends."""
STEPS = 2
"""Optimiser steps of each adapter that a measurement takes."""


class Capacity:
    """Doubles from 1 (`grow`) up to `most`. The steps it measures are steps of the sweep: nothing is computed twice."""

    def __init__(self, most: int, *, grow: bool) -> None:
        self.most = most
        self.size = 1 if grow else most
        self.rates: dict[int, float] = {}
        """Adapters -> tokens per second, as measured."""
        self._growing = grow and most > 1
        self._warm, self._tokens, self._seconds = True, 0, 0.0
        self._steps: dict[int, int] = {}

    def limit(self, size: int) -> None:
        """Memory ran out with more than `size` adapters."""
        self.most = self.size = max(1, size)
        self._growing = False

    def measure(self, held: int, steps: dict[int, int], tokens: int, seconds: float) -> None:
        """One pass over the pack: adapters held, optimiser steps done by each in it, and what it cost."""
        if not self._growing or held != self.size:
            self._start()
            return
        if self._warm:  # the first pass of a pack pays for allocations
            self._warm = False
            return
        self._tokens += tokens
        self._seconds += seconds
        for number, done in steps.items():
            self._steps[number] = self._steps.get(number, 0) + done
        if len(self._steps) == held and min(self._steps.values()) >= STEPS and self._seconds > 0:
            self._judge(self._tokens / self._seconds)

    def _judge(self, rate: float) -> None:
        self.rates[self.size] = rate
        before = self.rates.get(self.size // 2)
        if before is not None and rate < GAIN * before:
            self.size, self._growing = self.size // 2, False
        elif self.size >= self.most:
            self._growing = False
        else:
            self.size = min(2 * self.size, self.most)
        self._start()

    def _start(self) -> None:
        self._warm, self._tokens, self._seconds = True, 0, 0.0
        self._steps = {}
