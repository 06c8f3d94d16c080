"""``evaluate:`` what is measured besides the loss, during training and by `rayft evaluate`."""

from __future__ import annotations

from pydantic import Field

from rayft.config.section import Section


class Evaluate(Section):
    metrics: list[str] = Field(default_factory=list)
    """On generated answers: exact_match, or `package.module:function` with (predictions, references) -> float."""
    samples: int = Field(3, ge=0)
    """Generations shown at every evaluation."""
    limit: int | None = Field(None, ge=1)
    """At most this many examples are generated for `metrics`; the validation loss always takes all of them."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest generated answer, in tokens."""
    batch_size: int = Field(16, ge=1)
    """Prompts generated at once."""
