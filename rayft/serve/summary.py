"""Means and percentiles over the last requests, from the lines of `requests.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PERCENTILES = (50, 90, 95, 99)


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Times in seconds and speeds in tokens/s of the requests that succeeded; counts of all. Each is None where nothing
    is known, such as GPU numbers of a server without one."""
    done = [line for line in lines if line["status"] == 200]
    return {
        "requests": len(lines),
        "errors": len(lines) - len(done),
        "prompt_tokens": sum(line["prompt_tokens"] for line in done),
        "completion_tokens": sum(line["completion_tokens"] for line in done),
        "seconds": distribution([line["seconds"] for line in done]),
        "first_token_seconds": distribution([x for line in done if (x := line["first_token"]) is not None]),
        "tokens_per_second": distribution(
            [line["completion_tokens"] / line["seconds"] for line in done if line["seconds"] > 0]
        ),
        "memory_bytes": distribution([x for line in lines if (x := line["memory"]) is not None]),
        "gpu_memory_bytes": distribution([x for line in lines if (x := line["gpu_memory"]) is not None]),
        "gpu_utilization": distribution([x for line in lines if (x := line["gpu_utilization"]) is not None]),
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, extremes and percentiles, interpolated linearly as numpy does."""
    if not values:
        return None
    ordered = sorted(values)
    found = {"mean": sum(ordered) / len(ordered), "min": ordered[0], "max": ordered[-1]}
    for percent in PERCENTILES:
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{percent}"] = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
    return found
