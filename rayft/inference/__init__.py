"""Many requests in one batch."""

from rayft.inference.generator import Completion, Generator, Prompt, Sampling

__all__ = ["Completion", "Generator", "Prompt", "Sampling"]
