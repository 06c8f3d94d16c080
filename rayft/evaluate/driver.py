"""`score`: what a recipe, a run or a folder of weights is worth on held-out examples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft.config.recipe import Recipe
from rayft.evaluate.progress import Shown
from rayft.evaluate.result import Measured, Sample, Score
from rayft.evaluate.subject import Subject, subject
from rayft.evaluate.worker import News, Share, Side, measure
from rayft.metrics.registry import named
from rayft.runs.storage import locate

if TYPE_CHECKING:
    from rich.console import Console

    from rayft.evaluate.questions import Question
    from rayft.train.preparation import Preparation


def score(
    source: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
    quiet: bool = False,
) -> Score:
    """Score trained weights beside their base model on the held-out examples of `data.validation`.

    source: `run:NAME[@final|best|last|step-N]`, a run's or an adapter's folder, or a recipe (its run where there is
    one, else its base model alone). As many Ray workers as training would have take a share of the examples each; with
    ``scale.workers=0`` this process takes all. The progress is shown on `console` (standard error) unless `quiet`.

    Raises:
        UsageError: what the user can fix: R1xx recipe, R2xx data, R3xx models, R4xx references, R5xx cluster,
            R701 and R702 metrics, R703 and R704 nothing to score on, R705 data unknown.
    """
    from rayft.evaluate.questions import questions
    from rayft.train.preparation import prepare

    what = subject(source, overrides)
    for name in what.recipe.evaluate.metrics:
        named(name)
    preparation = prepare(_without_start(what.recipe))
    recipe = preparation.recipe
    asked = questions(preparation.data, recipe.evaluate)
    shares = _shares(what, preparation)
    ended: dict[Side, list[News]] = {}
    with Shown(console, quiet, workers=len(shares)) as shown:
        for index, news in _run(shares, preparation):
            shown.update(index, news)
            if news.sums is not None:
                ended.setdefault(news.side, []).append(news)
    return _result(what, preparation, asked, ended)


def _without_start(recipe: Recipe) -> Recipe:
    """What training began with does not matter any more."""
    if recipe.adapter is None:
        return recipe
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init_from": None})})


def _shares(what: Subject, preparation: Preparation) -> list[Share]:
    placement = preparation.placement
    examples = preparation.data.split("validation")
    assert examples is not None
    count = min(preparation.workers, len(examples))
    return [
        Share(
            recipe=preparation.recipe.model_dump(mode="json"),
            base=preparation.base,
            trained=what.trained.path if what.trained else None,
            kind=what.trained.kind if what.trained else None,
            data_folder=preparation.settled.data_folder,
            data_hash=preparation.data.hash,
            device=preparation.device,
            threads=None if placement is None else placement.cpus_per_worker,
            index=index,
            count=count,
        )
        for index in range(count)
    ]


def _run(shares: list[Share], preparation: Preparation) -> Iterator[tuple[int, News]]:
    """(index of the share, its news), as they come."""
    if preparation.placement is None:
        for share in shares:
            yield from ((share.index, news) for news in measure(share))
        return
    import ray

    resources = dict(preparation.placement.resources)
    task = ray.remote(measure).options(
        num_cpus=resources.pop("CPU", 1), num_gpus=resources.pop("GPU", 0), resources=resources, max_retries=2
    )
    running = {task.remote(share): share.index for share in shares}
    try:
        while running:
            (stream, *_), _ = ray.wait(list(running), num_returns=1)
            try:
                yield running[stream], ray.get(next(stream))
            except StopIteration:
                del running[stream]
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    finally:
        for stream in running:
            ray.cancel(stream)


def _result(what: Subject, preparation: Preparation, asked: list[Question], ended: dict[Side, list[News]]) -> Score:
    from rayft.evaluate.measure import measured

    recipe = preparation.recipe
    sides: dict[Side, Measured] = {}
    texts: dict[Side, dict[int, str]] = {}
    for side, parts in ended.items():
        total, weight = (sum(part.sums[i] for part in parts if part.sums) for i in (0, 1))
        texts[side] = {i: text for part in parts for i, text in (part.texts or {}).items()}
        sides[side] = measured(total, weight, asked, texts[side], recipe)
    samples = tuple(
        Sample(question.shown, question.reference, *(texts.get(side, {}).get(i) for side in ("base", "tuned")))
        for i, question in enumerate(asked[: recipe.evaluate.samples])
    )
    examples = preparation.data.split("validation")
    return Score(
        subject=what.name,
        base=sides.get("base"),
        tuned=sides.get("tuned"),
        samples=samples,
        examples=len(examples or ()),
        answers=len(asked) if recipe.evaluate.metrics else 0,
        path=what.trained.path if what.trained else None,
        kind=what.trained.kind if what.trained else None,
        next=_next(what),
    )


def _next(what: Subject) -> str:
    """After a base model its training; after a run the same recipe on other data."""
    if what.trained is None:
        return "rayft train with the same recipe, then rayft evaluate again"
    if what.trained.run is None:
        return f"rayft evaluate {_from_here(what.trained.path)} data.validation=YOUR.jsonl"
    recipe = _from_here(str(locate(what.trained.run) / "recipe.yaml"))
    return f"rayft train {recipe} name=mine data.train=YOUR.jsonl data.validation=0.1"


def _from_here(path: str) -> str:
    """Without the working directory, where the path lies below it."""
    return path.removeprefix(f"{os.getcwd()}/")
