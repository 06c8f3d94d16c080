"""The progress of an evaluation: bars on a terminal, a line per finished side in a log."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rayft.evaluate.worker import News, Side


class Shown:
    """Adds up the news of all workers and shows them. A context manager."""

    def __init__(self, console: Console | None = None, quiet: bool = False, workers: int = 1) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.workers = workers
        self.latest: dict[Side, dict[int, News]] = {}
        self.bars: dict[Side, TaskID] = {}
        columns = TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)

    def update(self, worker: int, news: News) -> None:
        """Take in what worker number `worker` has to say."""
        latest = self.latest.setdefault(news.side, {})
        latest[worker] = news
        total = sum(each.total for each in latest.values())
        if news.side not in self.bars:
            self.bars[news.side] = self.progress.add_task(news.side)
        done = sum(each.done for each in latest.values())
        self.progress.update(self.bars[news.side], completed=done, total=total)
        ended = len(latest) == self.workers and all(each.sums for each in latest.values())
        if ended and not self.console.is_terminal:
            self.console.print(f"evaluate: {news.side} model done, {total} answers", highlight=False)

    def __enter__(self) -> Shown:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
