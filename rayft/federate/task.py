"""A round as its clients hear of it, and what comes back from a block of them. Plain data, for actors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayft.federate.aggregate import Setting
from rayft.federate.messages import Alphas, Answer, Partial, Server
from rayft.federate.state import State


@dataclass(frozen=True)
class Task:
    """The same for all clients of a round; it goes into the object store once."""

    setting: Setting
    server: Server
    """Without its moments."""
    learning_rate: float


@dataclass(frozen=True)
class Block:
    """A unit of work: neighbours of the cohort, in order."""

    number: int
    clients: tuple[int, ...]
    kept: Mapping[int, int] = field(default_factory=dict)
    """Client -> round whose kept state is the current one."""
    site: int | None = None
    """Where its clients' data is pinned; None: any worker can take it."""


@dataclass(frozen=True)
class Opening:
    """What a worker tells when its base is loaded: the adapter's start, and what saving it needs."""

    state: State
    alphas: Alphas
    config: Any = None
    """PEFT's LoraConfig."""
    tokenizer: Any = None
    origin: Any = None


@dataclass(frozen=True)
class Measured:
    """A client's evaluation: loss on what it held out, and how many examples that are."""

    client: int
    loss: float
    examples: int


class Local(Protocol):
    """What a worker does for its clients. One object per process; the base stays loaded between calls."""

    def open(self) -> Opening: ...

    def train(self, task: Task, block: Block) -> list[Answer]:
        """One answer per client of the block, whatever happened to it."""
        ...

    def evaluate(self, task: Task, block: Block) -> list[Measured]:
        """Of the clients that hold something out."""
        ...

    def central(self, task: Task) -> float | None:
        """Loss on the recipe's validation data; None without any."""
        ...


@dataclass(frozen=True)
class Trained:
    """A block's work."""

    block: Block
    partial: Partial
    seconds: float
    peak_memory: int = 0
    """Bytes, of the process."""
    changes: tuple[tuple[int, State], ...] = ()
    """fedbuff only: (client, change) one by one."""


def kept_file(run: str, client: int, number: int) -> str:
    """Where in a run's folder a client's state after a round lies."""
    return f"{run}/clients/{client}/{number}.pt"
