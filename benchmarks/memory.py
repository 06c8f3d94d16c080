"""Peak memory and the largest logits of a few training steps, in a process of their own.

`train.py` runs it: prints one JSON object on standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rayft.train.speed import peak_process_memory

largest_logits = 0
"""Most elements that an output head has returned at once so far."""


def watch_logits(vocabulary: int) -> None:
    """Keep `largest_logits` up to date for every linear layer with `vocabulary` outputs."""
    stock_forward = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        global largest_logits
        output = stock_forward(self, hidden)
        if self.out_features == vocabulary:
            largest_logits = max(largest_logits, output.numel())
        return output

    torch.nn.Linear.forward = forward  # type: ignore[assignment]


def figures() -> dict[str, Any]:
    """Peak resident memory of this process in bytes, how much of it now are files that processes share, such as
    libraries, and the most elements of logits at once."""
    return {"peak_memory": peak_process_memory(), "file_memory": _file_memory(), "largest_logits": largest_logits}


def _file_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def main() -> None:
    from rayft.train import fit

    recipe, vocabulary = json.loads(sys.argv[1]), int(sys.argv[2])
    output, sys.stdout = sys.stdout, sys.stderr
    watch_logits(vocabulary)
    fit(recipe, quiet=True, answer=None)
    print(json.dumps(figures()), file=output)


if __name__ == "__main__":
    main()
