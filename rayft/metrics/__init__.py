"""What is counted: pure functions on texts, and perplexity."""

from rayft.metrics.loss import perplexity
from rayft.metrics.registry import METRICS, Metric, compute, named
from rayft.metrics.texts import exact_match, exact_match_whitespace, json_match

__all__ = [
    "METRICS",
    "Metric",
    "compute",
    "exact_match",
    "exact_match_whitespace",
    "json_match",
    "named",
    "perplexity",
]
