"""A fixed binary tree over blocks: what it joins, and in which order, depends on their number only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Part = TypeVar("Part")


class Tree(Generic[Part]):
    """Joins the parts 0 ... count - 1, given in any order, always by the same pairs.

    Neighbours are joined level by level; the last one of an odd level goes up alone. A pair is joined as soon as both
    are there, so that parts given about in order are held about log2(count) at a time.
    """

    def __init__(self, count: int, join: Callable[[Part, Part], Part]) -> None:
        self.count, self.join = count, join
        self._widths = [count]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._waiting: dict[tuple[int, int], Part] = {}

    @property
    def held(self) -> int:
        return len(self._waiting)

    def add(self, number: int, part: Part) -> None:
        """Raises ValueError for a number that is out of range or was given before."""
        if not 0 <= number < self.count or (0, number) in self._waiting:
            raise ValueError(f"part {number} of {self.count} does not fit in")
        level, place = 0, number
        while level < len(self._widths) - 1:
            other = place ^ 1
            if other < self._widths[level]:
                if (level, other) not in self._waiting:
                    break
                neighbour = self._waiting.pop((level, other))
                part = self.join(part, neighbour) if place < other else self.join(neighbour, part)
            level, place = level + 1, place // 2
        self._waiting[level, place] = part

    def result(self) -> Part:
        """All parts as one. Raises ValueError while some are missing."""
        if list(self._waiting) != [(len(self._widths) - 1, 0)]:
            raise ValueError("parts are missing")
        return self._waiting[len(self._widths) - 1, 0]


def joined(parts: Iterable[Part], join: Callable[[Part, Part], Part]) -> Part:
    """The parts as one, by a `Tree`. Raises ValueError when there are none."""
    listed = list(parts)
    tree = Tree[Part](len(listed), join)
    for number, part in enumerate(listed):
        tree.add(number, part)
    return tree.result()
