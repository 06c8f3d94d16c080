"""A replica that dies at each moment of a stream; what a real one gives and when it dies, a test cannot choose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rayft.inference.request import SamplingParams
from rayft.serve.job import Job, Piece
from rayft.serve.ray_backend import RayBackend

FIRST, LAST = Piece(0, "one"), Piece(0, " two", finish_reason="stop")
OTHER = Piece(1, "three", finish_reason="length")
DEATH = ActorDiedError()


class Stream:
    """One attempt: what comes, a death among it."""

    def __init__(self, came: list[Any]) -> None:
        self.came = came

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.came:
            if isinstance(item, Exception):
                raise item
            yield [item]

    def cancel(self) -> None:
        pass


class Handle:
    """A Ray Serve handle whose attempts are known beforehand."""

    def __init__(self, attempts: list[list[Any]]) -> None:
        self.attempts = attempts
        self.generate = self

    def options(self, **options: Any) -> Handle:
        return self

    def remote(self, job: Job) -> Stream:
        return Stream(self.attempts.pop(0))


def answers(attempts: list[list[Any]], n: int = 1) -> list[Piece]:
    """What comes of a job with these attempts; all of them are made."""
    handle = Handle(attempts)

    async def generate() -> list[Piece]:
        pieces = RayBackend(handle).generate(Job("1", "prompt", SamplingParams(8), n=n))
        return [piece async for batch in pieces for piece in batch]

    found = asyncio.run(generate())
    assert not attempts
    return found


@pytest.mark.parametrize(
    "attempts",
    [
        pytest.param([[FIRST, LAST]], id="alive"),
        pytest.param([[DEATH], [FIRST, LAST]], id="before the first piece"),
        pytest.param([[FIRST, LAST, DEATH]], id="after the last piece"),
    ],
)
def test_nothing_is_lost(attempts: list[list[Any]]) -> None:
    assert answers(attempts) == [FIRST, LAST]


@pytest.mark.parametrize(
    ("attempts", "n"),
    [
        pytest.param([[FIRST, DEATH]], 1, id="in the middle"),
        pytest.param([[FIRST, LAST, DEATH]], 2, id="one of two answers is whole"),
        pytest.param([[DEATH], [DEATH]], 1, id="twice"),
    ],
)
def test_what_was_begun_is_not_begun_again(attempts: list[list[Any]], n: int) -> None:
    with pytest.raises(ActorDiedError):
        answers(attempts, n)


def test_two_answers_that_are_whole() -> None:
    assert answers([[FIRST, OTHER, LAST, DEATH]], n=2) == [FIRST, OTHER, LAST]
