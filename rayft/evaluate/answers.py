"""What training calls at its evaluations, by import path: the answers of the model as it stands."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.evaluate import measure
from rayft.evaluate.questions import questions
from rayft.inference.hf import HFGenerator, active_adapter
from rayft.metrics.registry import compute
from rayft.models.load import dtype_of


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, recipe: Recipe, rank: int, workers: int
) -> dict[str, Any]:
    """Answer held-out questions, each worker a share of them; every worker calls this and gets the same result.

    Returns {"scalars": {label of a metric: value}, "samples": [{"prompt", "reference", "text"}]}, both empty where the
    recipe asks for neither.

    Raises:
        UsageError: R701 and R702 of the metrics, R704 no answers to compare with.
    """
    if not recipe.evaluate.metrics and not recipe.evaluate.samples:
        return {"scalars": {}, "samples": []}
    asked = questions(prepared, recipe.evaluate)
    device = next(model.parameters()).device
    generator = HFGenerator(
        model, tokenizer, batch_size=recipe.evaluate.batch_size, dtype=dtype_of(recipe, device.type)
    )
    mine = range(rank, len(asked), workers)
    texts: dict[int, str] = {}
    for batch in measure.answers(generator, active_adapter(model), [asked[i] for i in mine], recipe):
        texts |= {mine[i]: text for i, text in batch.items()}
    if workers > 1:
        shares: list[Any] = [None] * workers
        dist.all_gather_object(shares, texts)
        texts = {i: text for share in shares for i, text in share.items()}
    predictions = [texts[i] for i in range(len(asked))]
    samples = [
        {"prompt": question.shown, "reference": question.reference, "text": text}
        for question, text in zip(asked, predictions, strict=True)
    ]
    return {
        "scalars": compute(recipe.evaluate.metrics, predictions, [question.reference for question in asked]),
        "samples": samples[: recipe.evaluate.samples],
    }
