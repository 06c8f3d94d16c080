"""The engines of a cluster, seen from the HTTP side through a Ray Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from rayft.errors import RayftError
from rayft.serve.backend import ModelCard, ReplicaState
from rayft.serve.job import Content, Job, Piece

LOST = (ActorDiedError, ActorUnavailableError)
"""What a call raises when its replica died or its machine is gone."""


class RayBackend:
    """A `Backend` of all replicas of one deployment."""

    def __init__(self, handle: Any) -> None:
        """handle: of the deployment of `deployments.Engines`."""
        self.handle = handle
        self._card: ModelCard | None = None

    async def card(self) -> ModelCard:
        if self._card is None:
            self._card = await self.handle.card.remote()
        return self._card

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        """See `Backend.generate`. A job whose replica dies before its first piece runs once more on another one, and
        one whose replica dies after its last piece is complete."""
        for last_time in (False, True):
            begun, ended = False, 0
            # Jobs for one adapter like to meet where it is loaded already (see `router.Router`).
            adapter = job.adapter.hash if job.adapter else ""
            stream = self.handle.options(stream=True, multiplexed_model_id=adapter).generate.remote(job)
            try:
                async for pieces in stream:
                    begun = True
                    ended += sum(piece.finish_reason is not None for piece in pieces)
                    yield pieces
                return
            except LOST:
                if ended == job.n:
                    return
                if begun or last_time:
                    raise
            except RayTaskError as error:
                raise _cause(error) from None
            finally:
                stream.cancel()

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        await self._all("load", content, pinned)

    async def unload(self, hash: str) -> None:
        await self._all("unload", hash)

    async def states(self) -> list[ReplicaState]:
        return [state for states in await self._all("states") for state in states]

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all replicas that are alive."""
        try:
            return list(await asyncio.to_thread(lambda: self.handle.broadcast(method, *arguments).results()))
        except RayTaskError as error:
            raise _cause(error) from None


def _cause(error: RayTaskError) -> BaseException:
    """Our own error as the replica raised it, or Ray's with the traceback of what nobody expected."""
    return error.cause if isinstance(error.cause, RayftError) else error
