"""Numbers that follow from a mean loss."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss) of a mean token loss in nats: among how many equally likely tokens the model hesitates.

    inf where a float cannot hold it; nan stays nan.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
