"""Gaussian noise: from the system's secure generator, or computed again from a seed in tests."""

from __future__ import annotations

import hashlib
import math
import secrets

import numpy as np
import torch

from rayft.federate.state import State


class Noise:
    """A source of fp64 normal noise. With a seed it is a pure function of (seed, round, draw); tests only."""

    def __init__(self, seed: int | None = None, number: int = 0, who: str = "server") -> None:
        self._generator: torch.Generator | None = None
        if seed is not None:
            digest = hashlib.blake2b(f"{seed}/{number}/{who}".encode(), digest_size=8).digest()
            self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, shape: tuple[int, ...] | torch.Size, stddev: float) -> torch.Tensor:
        """Normal numbers [shape] with mean 0, fp64."""
        if self._generator is not None:
            return torch.randn(shape, generator=self._generator, dtype=torch.float64) * stddev
        return torch.from_numpy(secure_normal(math.prod(shape))).reshape(shape) * stddev

    def added(self, state: State, stddev: float) -> dict[str, torch.Tensor]:
        """The state with noise on every number."""
        return {name: tensor + self.normal(tensor.shape, stddev) for name, tensor in state.items()}


def secure_normal(count: int) -> np.ndarray:
    """float64[count] of standard normal numbers from the operating system's generator (Box and Muller).

    Each is the sum of four independent ones over 2, which hides the low bits that a single floating-point draw would
    give away (Holohan and Braghin, arXiv 2107.10138).
    """
    pairs = (count + 1) // 2
    total = np.zeros(2 * pairs)
    for _ in range(4):
        bits = np.frombuffer(secrets.token_bytes(16 * pairs), dtype=np.uint64)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53  # (0, 1]
        radius = np.sqrt(-2 * np.log(uniform[:pairs]))
        angle = 2 * np.pi * uniform[pairs:]
        total += np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return total[:count] / 2


def secure_uniform(count: int) -> np.ndarray:
    """float64[count], uniform in (0, 1], from the operating system's generator."""
    bits = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)
    return ((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
