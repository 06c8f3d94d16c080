"""How fast a sweep goes, and when it will have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rayft.tune.rows import TrialRow


def trial_seconds_left(row: TrialRow) -> float | None:
    """Time to the trial's last step at its own pace, as if no rung stopped it; None before its first step."""
    if row.state != "running" or not row.step:
        return None
    return row.seconds / row.step * max(0, row.total_steps - row.step)


class Pace:
    """The pace of a whole sweep, all lanes together, since it began to move."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`total`: trials that the sweep will have."""
        self.total = total
        self._clock = clock
        self._begin = self._since = clock()
        self._base: float | None = None

    @property
    def elapsed(self) -> float:
        return self._clock() - self._begin

    def read(self, rows: Sequence[TrialRow]) -> None:
        """What an earlier session has done, and the time until the first step, do not count."""
        done = sum(map(_done, rows))
        if self._base is None or done <= self._base:
            self._base, self._since = done, self._clock()

    def seconds_left(self, rows: Sequence[TrialRow]) -> float | None:
        """To the end of the last trial; None before anything was done.

        A trial is taken to be as long as those that have ended were on average, so early stopping counts as far as it
        was seen; one that is beyond that is taken to reach its last step.
        """
        done = sum(map(_done, rows)) - (self._base or 0.0)
        if done <= 0:
            return None
        ended = [_done(row) for row in rows if row.ended]
        usual = sum(ended) / len(ended) if ended else 1.0
        begun = [_done(row) for row in rows if not row.ended]
        ahead = sum(usual - share if share < usual else 1 - share for share in begun)
        return (self._clock() - self._since) / done * (ahead + usual * max(0, self.total - len(rows)))


def _done(row: TrialRow) -> float:
    """Share of the full budget."""
    return row.step / row.total_steps if row.total_steps else 0.0
