"""One source after the other: read, filter, render, truncate, count, write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from rayft.config.data import Data, Source
from rayft.data import function as row_function
from rayft.data.examples import Writer
from rayft.data.formats import Example, Format
from rayft.data.render import Rendered, Renderer
from rayft.data.sources import Row, read
from rayft.errors import UsageError

BATCH_ROWS = 256
"""Rows that are tokenised in one call."""
HEAD_ROWS = 100
"""Rows that are looked at to know the columns of a source."""
COLUMNS = ["input_ids", "loss_weights", "supervised", "source", "answer_start", "answer_end"]


@dataclass
class Counts:
    """What became of the rows of one source."""

    name: str
    rows: int = 0
    """Rows read."""
    dropped: int = 0
    """Rows that `data.function` dropped."""
    zero_supervised: int = 0
    """Rows left out because none of their tokens is trained on, after truncation."""
    zero_supervised_rows: list[str] = field(default_factory=list)
    """Where the first five of them stand."""
    zero_by_truncation: int = 0
    """Of `zero_supervised`: the answer lies beyond `max_length`."""
    zero_without_answer: int = 0
    """Of `zero_supervised`: the conversation has no assistant message."""
    truncated: int = 0
    """Rows longer than `max_length`."""
    truncated_tokens: int = 0
    """Tokens cut off."""
    examples: int = 0
    """Rows kept."""
    tokens: int = 0
    """Tokens of the rows kept."""
    supervised_tokens: int = 0
    """Of them those that `train_on` selects."""

    def plain(self) -> dict[str, Any]:
        """As plain data, with `truncated_share` of the rows that were rendered."""
        rendered = self.rows - self.dropped
        return {**asdict(self), "truncated_share": self.truncated / rendered if rendered else 0.0}


def ingest(
    source: Source, name: str, data: Data, renderer: Renderer, writer: Writer, label: str | None = None
) -> Counts:
    """Appends the examples of a source to ``writer`` (columns ``COLUMNS``). Raises UsageError R201 to R212, R214.

    label: a column of the rows whose value is kept as ``label``; R216 where a row has none.
    """
    counts = Counts(name)
    rows = islice(_kept(read(source), data.function, counts), source.limit)
    head = list(islice(rows, HEAD_ROWS))
    if not head:
        gone = f"data.function dropped all of its {counts.rows} rows" if counts.dropped else "it holds no rows"
        raise UsageError(
            "R214", f"data source {source.path} is empty: {gone}", "check the path, or take it out of the recipe"
        )
    format = Format(source, {column for row in head for column in row.values})
    examples = ((format.example(row), _label(row, label, source)) for row in chain(head, rows))
    while batch := list(islice(examples, BATCH_ROWS)):
        for (example, value), rendered in zip(batch, renderer.render([example for example, _ in batch]), strict=True):
            _add(example, rendered, data.max_length, counts, writer, {} if label is None else {"label": value})
    return counts


def _label(row: Row, label: str | None, source: Source) -> str | None:
    if label is None:
        return None
    value = row.values.get(label)
    if value is None or isinstance(value, dict | list):
        raise UsageError(
            "R216",
            f"data source {source.path}: {row.where} has no plain value in the column {label!r}, by which clients are "
            "told apart",
            f"federate.partition.column is one of {', '.join(row.values)}, or source",
        )
    return str(value)


def nothing_supervised(counts: Sequence[Counts], data: Data) -> UsageError:
    """The error for a data set in which no token is trained on: says for how many rows why."""
    zero = sum(count.zero_supervised for count in counts)
    truncated = sum(count.zero_by_truncation for count in counts)
    silent = sum(count.zero_without_answer for count in counts)
    reasons = [
        (truncated, f"lost their answer to truncation (data.max_length={data.max_length})"),
        (silent, "have no assistant message"),
        (
            zero - truncated - silent,
            f"have assistant messages that are not trained on (data.train_on={data.train_on}, weight: 0)",
        ),
    ]
    if truncated == zero:
        hint = "raise data.max_length"
    elif silent == zero:
        hint = "check the roles and the mapping in `columns`, or set data.train_on: all"
    else:
        hint = "check data.train_on, the messages' weights and the chat template"
    why = "; ".join(f"{number} {reason}" for number, reason in reasons if number)
    first = next(place for count in counts for place in count.zero_supervised_rows)
    return UsageError("R213", f"none of the {zero} examples has a token to train on: {why}; the first is {first}", hint)


def _kept(rows: Iterator[Row], function: str | None, counts: Counts) -> Iterator[Row]:
    """The rows after `data.function`, counted."""
    apply = row_function.load(function) if function else None
    for row in rows:
        counts.rows += 1
        result = row_function.apply(apply, row) if apply else row
        if result is None:
            counts.dropped += 1
        else:
            yield result


def _add(
    example: Example,
    rendered: Rendered,
    max_length: int,
    counts: Counts,
    writer: Writer,
    more: dict[str, str | None],
) -> None:
    length = len(rendered.ids)
    if length > max_length:
        counts.truncated += 1
        counts.truncated_tokens += length - max_length
    supervised = int(np.count_nonzero(rendered.supervised[:max_length]))
    if not supervised:
        counts.zero_supervised += 1
        counts.zero_supervised_rows = [*counts.zero_supervised_rows, example.where][:5]
        if rendered.supervised.any():
            counts.zero_by_truncation += 1
        elif example.messages and all(message["role"] != "assistant" for message in example.messages):
            counts.zero_without_answer += 1
        return
    counts.examples += 1
    counts.tokens += min(length, max_length)
    counts.supervised_tokens += supervised
    # An answer that was cut is no reference for what the model should generate.
    start, end = rendered.answer if rendered.answer and rendered.answer[1] <= max_length else (-1, -1)
    writer.append(
        input_ids=rendered.ids[:max_length],
        loss_weights=rendered.weights[:max_length],
        supervised=supervised,
        source=counts.name,
        answer_start=start,
        answer_end=end,
        **more,
    )
