"""The base of every section of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, attribute docstrings are the documentation of the keys.

    Strict, because lenient types hide mistakes: `rank: true` would be 1, and `epochs: "2"` would pass as a number.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        validate_assignment=True,
    )
