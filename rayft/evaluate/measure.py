"""Measure a model in memory: its loss on held-out examples, its answers, and what both amount to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rayft.config.recipe import Recipe
from rayft.data import Examples, Prepared
from rayft.data.collate import collate
from rayft.evaluate.questions import Question, questions
from rayft.evaluate.result import Measured
from rayft.inference.generator import Generator, Prompt, Sampling
from rayft.inference.hf import active_adapter
from rayft.metrics import perplexity
from rayft.metrics.registry import compute
from rayft.models.load import compute_context, dtype_of
from rayft.objectives import causal

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward pass, by the kind of device."""


def evaluate_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, recipe: Recipe, generator: Generator
) -> dict[str, Any]:
    """Score a model in memory on the held-out examples of `prepared`.

    model: a causal LM or the `PeftModel` around one, in the number format of ``recipe.model.dtype``; the generator
    answers with its active adapter. Returns {"validation_loss", "perplexity", "metrics": {label: value},
    "samples": [{"prompt", "reference", "text"}]}.

    Raises:
        UsageError: R701 and R702 of the metrics, R704 no answers to compare with.
    """
    examples = prepared.split("validation")
    assert examples is not None
    asked = questions(prepared, recipe.evaluate)
    total, weight = loss_sums(model, examples, range(len(examples)), recipe, tokenizer)
    texts: dict[int, str] = {}
    for batch in answers(generator, active_adapter(model), asked, recipe):
        texts |= batch
    numbers = measured(total, weight, asked, texts, recipe)
    samples = [
        {"prompt": question.shown, "reference": question.reference, "text": texts[i]}
        for i, question in enumerate(asked[: recipe.evaluate.samples])
    ]
    return {
        "validation_loss": numbers.validation_loss,
        "perplexity": numbers.perplexity,
        "metrics": numbers.metrics,
        "samples": samples,
    }


def loss_sums(
    model: Any,
    examples: Examples,
    indices: Sequence[int],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bare: bool = False,
) -> tuple[float, float]:
    """(sum of weight x token loss, sum of weights) over the examples at `indices`; fp64 sums.

    bare: of the base model, with the adapter switched off. The validation loss is the first over the second, summed
    over all examples.
    """
    off = bare and isinstance(model, PeftModel)
    target = model.get_base_model() if off else model
    device = next(model.parameters()).device
    total = weight = 0.0
    with torch.no_grad(), model.disable_adapter() if off else nullcontext(), _with_objective(target, recipe):
        for batch in _batches(examples.lengths, indices, BATCH_TOKENS[device.type]):
            rows = collate([examples[i] for i in batch], recipe.data.padding_free, int(tokenizer.pad_token_id))
            inputs = {name: tensor.to(device) for name, tensor in rows.items()}
            with compute_context(dtype_of(recipe, device.type), device.type):
                total += float(target(**inputs).loss.double())
            weight += float(inputs["loss_weights"].double().sum())
    return total, weight


@contextmanager
def _with_objective(model: Any, recipe: Recipe) -> Iterator[None]:
    """In evaluation mode and able to take `loss_weights`; afterwards as it was."""
    training, forward = model.training, vars(model).get("forward")
    model.eval()
    causal.install(model, loss_function=causal.own_loss(recipe.train.loss_function))
    try:
        yield
    finally:
        del model.forward
        if forward is not None:
            model.forward = forward
        model.train(training)


def answers(
    generator: Generator, adapter: str | None, asked: Sequence[Question], recipe: Recipe
) -> Iterator[dict[int, str]]:
    """Greedy answers, batch by batch, the longest questions first: {index in `asked`: text}."""
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))
    sampling = Sampling(max_new_tokens=recipe.evaluate.max_new_tokens)
    for start in range(0, len(order), recipe.evaluate.batch_size):
        batch = order[start : start + recipe.evaluate.batch_size]
        completions = generator.generate([Prompt(asked[i].ids, adapter) for i in batch], sampling)
        yield {i: completion.text for i, completion in zip(batch, completions, strict=True)}


def measured(
    total: float, weight: float, asked: Sequence[Question], texts: Mapping[int, str], recipe: Recipe
) -> Measured:
    """The numbers that follow from the sums of the loss and all answers."""
    loss = total / weight
    references = [question.reference for question in asked]
    values = compute(recipe.evaluate.metrics, [texts[i] for i in range(len(asked))], references)
    return Measured(loss, perplexity(loss), values)


def _batches(lengths: np.ndarray, indices: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Examples of similar length, as many as `most_tokens` hold where each is as long as the longest; at least one."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda i: int(lengths[i])):
        if batch and (len(batch) + 1) * int(lengths[index]) > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
