"""The adapters that requests may name: content in host memory, the ones in use in slots on the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from rayft.errors import UsageError
from rayft.multilora.bank import Bank
from rayft.multilora.parts import Parts


@dataclass
class _Adapter:
    parts: Parts
    slot: int | None = None
    users: int = 0
    """Requests that are being computed with it."""
    holders: int = 0
    """Requests in flight that name it, computed or waiting."""
    pinned: bool = False
    forgotten: bool = False


class AdapterTable:
    """Adapters by content hash, at most ``max_loras`` of them in a bank's slots. All but `hold` happens between steps.

    Two adapters of the same content are one; a name that is given to other content answers with it from the next
    request on, while requests in flight keep what they began with.
    """

    def __init__(self, bank: Bank, max_loras: int, dtype: torch.dtype) -> None:
        """dtype: of the base's computation; adapters are kept in it on the device."""
        self.bank, self.max_loras, self.dtype = bank, max_loras, dtype
        self._adapters: dict[str, _Adapter] = {}
        self._names: dict[str, str] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        """Loaded and neither pinned nor in use, the least recently used first."""
        self._changing = threading.Lock()
        """Requests take hold of adapters while a step runs."""

    def register(self, parts: Parts, hash: str, name: str | None = None) -> None:
        """Make an adapter known by its content hash and by ``name``."""
        if hash not in self._adapters:
            self._adapters[hash] = _Adapter(parts)
        self._adapters[hash].forgotten = False
        if name is not None:
            self._names[name] = hash

    def known(self, name: str) -> str:
        """The content hash that a name or a hash stands for now. Raises UsageError R815 for an unknown one."""
        hash = self._names.get(name, name)
        if hash not in self._adapters or self._adapters[hash].forgotten:
            raise UsageError("R815", f"no adapter {name} is registered", f"known: {', '.join(self.names) or 'none'}")
        return hash

    @property
    def names(self) -> list[str]:
        return sorted(self._names)

    @property
    def loaded(self) -> frozenset[str]:
        """Hashes of the adapters that are in a slot."""
        return frozenset(hash for hash, adapter in self._adapters.items() if adapter.slot is not None)

    def hold(self, name: str) -> str:
        """The content hash that a name or a hash stands for; its content stays until `drop`. Raises UsageError R815."""
        with self._changing:
            hash = self.known(name)
            self._adapters[hash].holders += 1
        return hash

    def drop(self, hash: str) -> None:
        with self._changing:
            self._adapters[hash].holders -= 1
            self._settle(hash)

    def available(self, hash: str) -> bool:
        """Whether `acquire` would do: it is in a slot, or one is free or held by an adapter that is not in use."""
        return self._adapters[hash].slot is not None or len(self.loaded) < self.max_loras or bool(self._idle)

    def acquire(self, hash: str) -> int:
        """The slot of an available adapter, loaded if need be, until it is released as often as acquired."""
        adapter = self._adapters[hash]
        slot = self._load(adapter) if adapter.slot is None else adapter.slot
        self._idle.pop(hash, None)
        adapter.users += 1
        return slot

    def release(self, hash: str) -> None:
        self._adapters[hash].users -= 1
        self._settle(hash)

    def is_pinned(self, hash: str) -> bool:
        return self._adapters[hash].pinned

    def pin(self, hash: str, pinned: bool = True) -> None:
        """Keep an adapter in its slot, used or not. One slot stays for those that are not pinned.

        Raises:
            UsageError: R816 where no slot is free for it.
        """
        adapter = self._adapters[hash]
        if pinned and not adapter.pinned:
            others = sum(other.pinned for other in self._adapters.values())
            if others + 1 >= self.max_loras or not self.available(hash):
                text = f"of {self.max_loras} slots {others} are pinned, and the others are in use or kept for others"
                raise UsageError("R816", text, "raise max_loras or unpin an adapter")
            if adapter.slot is None:
                self._load(adapter)
        adapter.pinned = pinned
        self._settle(hash)

    def forget(self, hash: str) -> None:
        """Give the adapter's memory back as soon as no request in flight uses it; new ones are refused at once."""
        with self._changing:
            adapter = self._adapters[hash]
            adapter.forgotten, adapter.pinned = True, False
            self._names = {name: known for name, known in self._names.items() if known != hash}
            self._settle(hash)

    def _load(self, adapter: _Adapter) -> int:
        if len(self.loaded) >= self.max_loras:
            self._unload(self._adapters[self._idle.popitem(last=False)[0]])
        adapter.slot = self.bank.put(adapter.parts, self.dtype)
        return adapter.slot

    def _unload(self, adapter: _Adapter) -> None:
        assert adapter.slot is not None
        self.bank.unload(adapter.slot)
        adapter.slot = None

    def _settle(self, hash: str) -> None:
        """Put an adapter where it belongs after its use has changed."""
        adapter = self._adapters[hash]
        self._idle.pop(hash, None)
        if adapter.forgotten and not adapter.holders:
            if adapter.slot is not None:
                self._unload(adapter)
            del self._adapters[hash]
        elif adapter.slot is not None and not adapter.users and not adapter.pinned:
            self._idle[hash] = None
