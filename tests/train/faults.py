"""Loss functions that go wrong on purpose; `RAYFT_TEST_FAULT` names a scratch folder that says when.

Each is the plain weighted cross-entropy until its moment comes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import torch


def _folder() -> Path:
    return Path(os.environ["RAYFT_TEST_FAULT"])


def _call() -> int:
    """The number of this call, over all processes and attempts of one test."""
    with open(_folder() / "calls", "ab") as file:
        file.write(b".")
        return file.tell()


def plain(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum()


def crash_once(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Raises in the eleventh call, once."""
    if _call() == 11:
        raise ValueError("crash at call 11")
    return plain(logits, targets, weights)


def crash_always(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Raises whenever one certain batch comes (the longest one)."""
    if len(targets) >= int(os.environ["RAYFT_TEST_ROWS"]):
        raise ValueError(f"crash with {len(targets)} rows")
    return plain(logits, targets, weights)


def out_of_memory(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A device that has room for a certain number of rows."""
    if len(targets) >= int(os.environ["RAYFT_TEST_ROWS"]):
        raise torch.OutOfMemoryError(f"out of memory: tried to allocate {len(targets)} rows")
    return plain(logits, targets, weights)


def out_of_memory_in_evaluation(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A device that is full at the first evaluation."""
    if not torch.is_grad_enabled() and _call() == 1:
        raise torch.OutOfMemoryError
    return plain(logits, targets, weights)


def nan_once(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    loss = plain(logits, targets, weights)
    return loss * float("nan") if _call() == 11 else loss


def interrupt_once(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Ctrl-C at the eleventh call."""
    if _call() == 11:
        os.kill(os.getpid(), signal.SIGINT)
    return plain(logits, targets, weights)


def kill_once(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """kill -9 of this worker at the eleventh call."""
    if _call() == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(logits, targets, weights)


def paced(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Waits as many seconds per call as the file `pace` says; without it, not at all."""
    with contextlib.suppress(FileNotFoundError):
        time.sleep(float((_folder() / "pace").read_text()))
    return plain(logits, targets, weights)
