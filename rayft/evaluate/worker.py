"""What one worker measures: its share of the held-out examples, on the base model and on the tuned one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rayft.config.recipe import Recipe

Side = Literal["base", "tuned"]


@dataclass(frozen=True)
class Share:
    """Plain data. `index` of `count`: the worker takes every count-th example from the index-th on."""

    recipe: dict[str, Any]
    base: str
    trained: str | None
    kind: Literal["adapter", "model"] | None
    data_folder: str
    data_hash: str
    device: str
    """cpu or gpu."""
    threads: int | None
    """Computing threads; None leaves them as they are."""
    index: int
    count: int


@dataclass(frozen=True)
class News:
    """`done` of `total` answers of a side; with the last one the side's sums and answers."""

    side: Side
    done: int
    total: int
    sums: tuple[float, float] | None = None
    """Sum of weight x token loss, sum of weights."""
    texts: dict[int, str] | None = None
    """Index of the question -> answer."""


def measure(share: Share) -> Iterator[News]:
    """Load the models and measure them, with news after every batch."""
    import torch

    from rayft.evaluate.measure import answers, loss_sums
    from rayft.evaluate.questions import questions
    from rayft.inference.hf import HFGenerator, active_adapter
    from rayft.models.load import dtype_of
    from rayft.runs import reference
    from rayft.train.preparation import data_here
    from rayft.train.worker import quiet

    quiet()
    if share.threads is not None:
        torch.set_num_threads(share.threads)
    recipe = Recipe.model_validate(share.recipe)
    device = "cuda" if share.device == "gpu" else "cpu"
    prepared = data_here(share.data_folder, share.data_hash)
    trained = reference.on_this_machine(share.trained) if share.trained else None
    examples = prepared.split("validation")
    assert examples is not None
    asked = questions(prepared, recipe.evaluate)
    mine = range(share.index, len(asked), share.count)
    for side, model, tokenizer in _sides(share, trained, recipe, device):
        yield News(side, 0, len(mine))
        bare = side == "base"
        sums = loss_sums(model, examples, range(share.index, len(examples), share.count), recipe, tokenizer, bare=bare)
        generator = HFGenerator(model, tokenizer, batch_size=recipe.evaluate.batch_size, dtype=dtype_of(recipe, device))
        adapter = None if bare else active_adapter(model)
        texts: dict[int, str] = {}
        for batch in answers(generator, adapter, [asked[i] for i in mine], recipe):
            texts |= {mine[i]: text for i, text in batch.items()}
            if len(texts) < len(mine):
                yield News(side, len(texts), len(mine))
        yield News(side, len(mine), len(mine), sums, texts)


def _sides(share: Share, trained: str | None, recipe: Recipe, device: str) -> Iterator[tuple[Side, Any, Any]]:
    """(side, model, tokenizer). An adapter and its base are one model in memory; two models follow each other."""
    from rayft.models import hub, load
    from rayft.models.save import load_trained

    if share.kind == "adapter":
        assert trained is not None
        model, tokenizer = load_trained(trained, device=device, dtype=load.dtype_of(recipe, device))
        yield "base", model, tokenizer
        yield "tuned", model, tokenizer
        return
    if share.base != share.trained:
        folder = hub.fetch(share.base, recipe.model.revision)
        yield "base", load.load_base(recipe, folder, device), load.load_tokenizer(recipe, folder)
        gc.collect()
    if trained is not None:  # in fp32 as in training, which computes in `dtype` from fp32 masters
        model, tokenizer = load_trained(trained, device=device, dtype="fp32")
        yield "tuned", model, tokenizer
