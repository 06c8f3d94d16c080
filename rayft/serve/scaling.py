"""How many replicas the waiting prompts need: Ray Serve asks this in its controller."""

from __future__ import annotations

import math
from typing import Any

QUEUED_TOKENS = "queued_tokens"
"""What each replica reports as `record_autoscaling_stats`."""


def by_queued_tokens(context: Any, *, target: int) -> tuple[int, dict[str, Any]]:
    """Replicas such that ``target`` tokens of prompts wait at each, and what the policy remembers (nothing).

    Requests do not say how much work they are: one of 4,000 tokens is worth a hundred of 40. Ray Serve applies bounds
    and delays to what this returns. One replica at a time goes when nothing waits anywhere and fewer requests run than
    there are replicas.
    """
    current = max(1, context.current_num_replicas)
    queued = sum(context.aggregated_metrics.get(QUEUED_TOKENS, {}).values())
    if queued > target * current:
        return math.ceil(queued / target), {}
    idle = queued == 0 and context.total_num_requests < current
    return (current - 1 if idle else current), {}
