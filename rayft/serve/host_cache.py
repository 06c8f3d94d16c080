"""The adapters that one replica has in host memory: read on first use, off the step thread, given up for others."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.models.save import BASE
from rayft.multilora.bank import AdapterState
from rayft.serve.job import Content

PER_TENSOR = 4096
"""Bytes that a tensor takes besides its numbers: objects, rounded sizes, gaps. Measured with adapters of 0.5 MB in 56
tensors."""


@dataclass
class _Entry:
    size: int = 0
    """Bytes of its tensors."""
    users: int = 0
    """Jobs that need it now."""
    pinned: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the engine knows the adapter, and when it cannot be read."""
    failed: Exception | None = None
    unwanted: bool = False
    """To be given up as soon as no job needs it."""


class HostCache:
    """Everything here runs in one event loop; files are read and the engine is told in threads.

    The engine keeps the adapters of its slots on the device; this decides which ones it has in host memory at all.
    """

    def __init__(self, engine: Engine, limit: int, max_rank: int, base_hash: str | None) -> None:
        """limit: bytes of all adapters, of which those in use may take more. max_rank: larger adapters are refused."""
        self.engine, self.limit, self.max_rank, self.base_hash = engine, limit, max_rank, base_hash
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By content hash, the least recently used first."""
        self._telling = asyncio.Lock()
        """The engine learns and forgets adapters one after the other, in the order in which it was decided."""
        self._reading = asyncio.Semaphore(2)
        """What is being read is in memory twice."""
        self._freed = 0
        """Bytes since memory was last returned to the system."""

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(hash for hash, entry in self._entries.items() if entry.ready.is_set())

    @contextlib.asynccontextmanager
    async def using(self, content: Content) -> AsyncIterator[None]:
        """The engine knows the adapter inside, whatever else happens.

        Raises:
            UsageError: R801 (damaged), R802 (what cannot share a base), R803 (of another base), R819 (its files are not
                those that were registered, or its rank is too large).
        """
        entry = await self._hold(content)
        try:
            yield
        finally:
            entry.users -= 1
            await self._make_room()

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        """Bring an adapter in before it is asked for. Raises as `using` does, and UsageError R816 for no free slot."""
        async with self.using(content):
            entry = self._entries[content.hash]
            if pinned is not None and pinned != entry.pinned:
                await asyncio.to_thread(self.engine.pin, content.hash, pinned)
                entry.pinned = pinned

    async def unload(self, hash: str) -> None:
        """Give an adapter up as soon as no job uses it; one that is not here is no error."""
        if (entry := self._entries.get(hash)) is not None:
            entry.unwanted, entry.pinned = True, False
            await self._make_room()

    async def _hold(self, content: Content) -> _Entry:
        entry = self._entries.get(content.hash)
        if entry is None:
            entry = self._entries[content.hash] = _Entry()
            asyncio.get_running_loop().create_task(self._bring(content, entry))
        self._entries.move_to_end(content.hash)
        entry.unwanted = False
        entry.users += 1
        try:
            await entry.ready.wait()
            if entry.failed is not None:
                raise entry.failed
        except BaseException:
            entry.users -= 1
            raise
        return entry

    async def _bring(self, content: Content, entry: _Entry) -> None:
        try:
            async with self._reading:
                state = await asyncio.to_thread(self._read, content)
                entry.size = size_of(state)
                await self._make_room()
                async with self._telling:
                    await asyncio.to_thread(self.engine.register, state)
        except Exception as error:
            entry.failed = error
            del self._entries[content.hash]  # the next request tries again
        entry.ready.set()

    def _read(self, content: Content) -> AdapterState:
        state = AdapterState.read(content.path)
        if state.content_hash() != content.hash:
            raise UsageError("R819", f"{content.path} does not hold what was registered as {content.hash[:12]}")
        down = (".lora_A.weight", ".lora_embedding_A")
        ranks = [tensor.shape[0] for name, tensor in state.tensors.items() if name.endswith(down)]
        if max(ranks, default=0) > self.max_rank:
            raise UsageError(
                "R819", f"the adapter's rank is {max(ranks)}, the limit {self.max_rank}", "raise serve.max_lora_rank"
            )
        facts = Path(content.path, BASE)
        trained_on = json.loads(facts.read_text()).get("base_hash") if facts.is_file() else None
        if self.base_hash and trained_on and trained_on != self.base_hash:
            raise UsageError("R803", "this adapter was trained on other base weights than those that are served")
        return state

    async def _make_room(self) -> None:
        """Give up what nobody wants, then what was not used for longest, until the rest is within the limit."""
        async with self._telling:
            while (hash := self._superfluous()) is not None:
                self._freed += self._entries.pop(hash).size
                await asyncio.to_thread(self.engine.forget, hash)
            if self._freed > self.limit // 8:
                self._freed = 0
                await asyncio.to_thread(_return_memory)

    def _superfluous(self) -> str | None:
        idle = [(hash, e) for hash, e in self._entries.items() if e.ready.is_set() and not e.users and not e.pinned]
        for hash, entry in idle:
            if entry.unwanted:
                return hash
        over = sum(entry.size for entry in self._entries.values()) > self.limit
        return idle[0][0] if over and idle else None


def size_of(state: AdapterState) -> int:
    """Bytes of host memory that an adapter takes."""
    return sum(tensor.nbytes + PER_TENSOR for tensor in state.tensors.values())


def _return_memory() -> None:
    """glibc keeps freed memory that lies between used one: after some thousand adapters, half as much again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
