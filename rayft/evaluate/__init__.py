"""What a model scores on held-out examples: loss, perplexity, metrics on its answers, the base beside the tuned one."""

from rayft.evaluate.driver import score
from rayft.evaluate.measure import evaluate_model
from rayft.evaluate.result import Measured, Sample, Score

__all__ = ["Measured", "Sample", "Score", "evaluate_model", "score"]
