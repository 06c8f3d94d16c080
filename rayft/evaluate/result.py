"""The result of an evaluation, as an object, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayft.metrics.registry import finite


@dataclass(frozen=True)
class Measured:
    """The numbers of one model."""

    validation_loss: float
    """Mean over the supervised tokens of all held-out examples, in nats, weighted as in training."""
    perplexity: float
    metrics: dict[str, float]
    """Label -> value, of `evaluate.metrics`."""


@dataclass(frozen=True)
class Sample:
    """One held-out request with the answers to it."""

    prompt: str
    reference: str
    base: str | None
    tuned: str | None


@dataclass(frozen=True)
class Score:
    """The base against the tuned model. One of the two is None where there is only the other."""

    subject: str
    """What was scored: the run's name, or the recipe's, or a folder."""
    base: Measured | None
    tuned: Measured | None
    samples: tuple[Sample, ...]
    examples: int
    """Held-out examples behind the loss."""
    answers: int
    """Held-out examples behind the metrics."""
    path: str | None
    """Folder of the trained weights."""
    kind: Literal["adapter", "model"] | None
    """What lies there: a stock PEFT adapter or a stock transformers model."""
    next: str
    """The command to try next."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; nan and inf become None."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def to_rich(self) -> RenderableType:
        """The table of numbers, the samples, where the weights lie and what to try next."""
        fewer = f", metrics on {self.answers} of them" if 0 < self.answers < self.examples else ""
        title = Text(f"{self.subject} on {self.examples} held-out examples{fewer}", style="bold")
        parts: list[RenderableType] = [title, self._numbers()]
        if self.samples:
            parts += ["", self._samples()]
        places = Table.grid(padding=(0, 2))
        if self.path is not None:
            places.add_row(Text(str(self.kind), style="bold"), Text(self.path, overflow="fold"))
        places.add_row(Text("next", style="bold"), Text(self.next, overflow="fold"))
        return Group(*parts, "", places)

    def _numbers(self) -> Table:
        table = Table()
        columns = [(name, side) for name, side in (("base", self.base), ("tuned", self.tuned)) if side is not None]
        table.add_column("")
        for name, _ in columns:
            table.add_column(name, justify="right")
        table.add_row("validation loss", *(f"{side.validation_loss:.4f}" for _, side in columns))
        table.add_row("perplexity", *(f"{side.perplexity:.4g}" for _, side in columns))
        for metric in columns[0][1].metrics:
            table.add_row(metric.replace("_", " "), *(f"{side.metrics[metric]:.3f}" for _, side in columns))
        return table

    def _samples(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for sample in self.samples:
            lines = {"asked": sample.prompt, "wanted": sample.reference, "base": sample.base, "tuned": sample.tuned}
            for name, text in lines.items():
                if text is not None:
                    right = name in ("base", "tuned") and text.strip() == sample.reference.strip()
                    shown = Text(_short(text), overflow="fold", style="green" if right else "")
                    grid.add_row(Text(name, style="bold" if name == "asked" else "dim"), shown)
            if sample is not self.samples[-1]:
                grid.add_row("", "")
        return grid


def _short(text: str, most: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 2]} …"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
