"""``data:`` where the examples come from and which of their tokens are trained on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rayft.config.section import Section

DataFormat = Literal["auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text"]


class Source(Section):
    path: str
    """JSONL, JSON, CSV, Parquet or Arrow file, a folder or glob of such files, a bucket URI, or a Hub data set."""
    format: DataFormat = "auto"
    """Shape of the rows; `auto` looks at the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name -> their column, or a template string such as `"Summarize: {text}"`.
    Names: messages, tools, system, prompt, completion, instruction, input, output, conversations, text."""
    split: str = "train"
    """Split of a Hub data set."""
    weight: float = Field(1.0, gt=0)
    """Share of this source in every epoch: 0.5 takes half of it, 2 takes it twice."""
    limit: int | None = Field(None, ge=1)
    """At most this many examples, the first ones."""
    name: str | None = None
    """Name in statistics; the file's name by default."""


class Data(Section):
    train: list[Source]
    """A path or a list of sources."""
    validation: float | list[Source] | None = None
    """A fraction held out of `train` (drawn with `seed`), or sources of its own."""
    max_length: int = Field(2048, ge=2)
    """Tokens per example; longer ones are cut at the end, and the truncated share is printed."""
    padding_free: bool = True
    """Lay each micro-batch end to end in one row: no padding, the same numbers."""
    packing: bool = False
    """Fill bins of `max_length` across the data set: fewer steps, another trajectory."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which turns are supervised. A message may carry `weight: 0`."""
    prompt_loss_weight: float = Field(0.0, ge=0, le=1)
    """Loss weight of the tokens that are not supervised otherwise."""
    chat_template: str | None = None
    """Jinja text or the path of a file; the tokenizer's own template by default. Saved with the run."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the template, such as `enable_thinking`. Saved with the run."""
    function: str | None = None
    """`package.module:function` or `file.py:function`: row -> row, or None to drop it; before the format is read."""

    @field_validator("train", mode="before", json_schema_input_type=str | Source | list[str | Source])
    @classmethod
    def _as_sources(cls, value: Any) -> Any:
        return as_sources(value)

    @field_validator(
        "validation", mode="before", json_schema_input_type=float | str | Source | list[str | Source] | None
    )
    @classmethod
    def _as_fraction_or_sources(cls, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        return as_sources(value)

    @field_validator("validation")
    @classmethod
    def _fraction_in_range(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a fraction lies between 0 and 1")
        return value


def as_sources(value: Any) -> Any:
    """A path, a mapping or a list of either, as a list of sources."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]
