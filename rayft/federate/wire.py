"""How long messages are, counted as if each client were a machine of its own. Looks at shapes and number formats."""

from __future__ import annotations

from rayft.config.federate import Federate
from rayft.federate.messages import Alphas, Server
from rayft.federate.start import sent, start, trained
from rayft.federate.state import size_of


def down(federate: Federate, server: Server, alphas: Alphas, rank: int | None) -> float:
    """Bytes that a client of that rank is sent in a round: the factors, the accumulator, control variates."""
    begun = start(federate, server.state, alphas, rank)
    numbers = sum(B.numel() + A.numel() for B, A in server.accumulator.values())
    numbers += sum(tensor.numel() for tensor in server.control.values())
    return (size_of(begun) + 4 * numbers) / (2 if federate.wire == "bf16" else 1)


def up(federate: Federate, server: Server, number: int) -> float:
    """Bytes that a client of the server's rank answers in round ``number``; scaffold's changes of control are fp64."""
    names = sent(federate, trained(federate, server.state, number))
    size = size_of({name: server.state[name] for name in names})
    if federate.strategy == "scaffold":
        size += 8 * sum(server.state[name].numel() for name in names)
    return size / (2 if federate.wire == "bf16" else 1)
