"""A thread that steps an engine, and requests as async iterators: the event loop never waits for the model."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rayft.inference.engine import Engine
from rayft.inference.request import Request, TokenEvent
from rayft.inference.sampling import TokenMask


@dataclass(frozen=True)
class Order:
    """A request with what its answer must look like and who writes it (see `Engine.add`)."""

    request: Request
    mask: TokenMask | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


class Runner:
    """Steps while there is something to do. Use as a context manager, or `start` and `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: str | None = None
        """Why the last step failed, if one did. Its requests have ended with it; the runner goes on."""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rayft-engine", daemon=True)

    def __enter__(self) -> Runner:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the step that is running; requests in flight end with an error, later ones as cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self.engine.fail("the engine was stopped")

    def submit(self, request: Request, mask: TokenMask | None = None) -> AsyncIterator[TokenEvent]:
        """The events of a request, the last of which has a finish reason. An iterator that is closed or cancelled
        cancels its request.

        Raises:
            UsageError, Overloaded: as `Engine.add` does, before the first event is asked for.
        """
        return _single(self.submit_all([Order(request, mask)]))

    def submit_all(self, orders: Sequence[Order]) -> AsyncGenerator[list[TokenEvent], None]:
        """The events of several requests as they come, those that came together in one list, until all have ended.

        Raises:
            UsageError, Overloaded: of the first that is refused; then none of them runs.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def send(event: TokenEvent) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens any more, which must not disturb others
                self.engine.cancel(event.id)

        taken: list[str] = []
        try:
            for order in orders:
                self.engine.add(order.request, send, order.mask, order.tokenizer)
                taken.append(order.request.id)
        except BaseException:
            for id in taken:
                self.cancel(id)
            raise
        if self._stopping:
            for id in taken:
                self.engine.cancel(id)
        self._wake.set()
        return self._events(set(taken), events)

    def cancel(self, id: str) -> None:
        """End a request; its iterator gets one more event."""
        self.engine.cancel(id)
        self._wake.set()

    async def _events(
        self, running: set[str], events: asyncio.Queue[TokenEvent]
    ) -> AsyncGenerator[list[TokenEvent], None]:
        try:
            while running:
                came = [await events.get()]
                while not events.empty():
                    came.append(events.get_nowait())
                running -= {event.id for event in came if event.finish_reason is not None}
                yield came
        finally:
            for id in running:
                self.cancel(id)

    def _run(self) -> None:
        while not self._stopping:
            if not self.engine.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                self.engine.step()
            except Exception as error:  # whatever a device or a model raises ends these requests, not the server
                self.error = "".join(traceback.format_exception_only(error)).strip()
                self.engine.fail(self.error)


async def _single(batches: AsyncGenerator[list[TokenEvent], None]) -> AsyncIterator[TokenEvent]:
    try:
        async for batch in batches:
            for event in batch:
                yield event
    finally:
        await batches.aclose()
