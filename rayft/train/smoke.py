"""`--smoke`: the whole way in a minute, so that the first mistake does not cost the start of a cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayft import config
from rayft.config.recipe import Recipe

STEPS = 3
ROWS = 64


def shrunk(recipe: Recipe, storage: str) -> dict[str, Any]:
    """The recipe cut down to a few steps on a few rows, in this process, with its runs in `storage`."""
    plain = recipe.model_dump(mode="json")
    plain["storage"] = storage
    plain["scale"] |= {"workers": 0, "strategy": "ddp", "offload": False}
    plain["train"] |= {"max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1, "report_to": []}
    plain["train"]["global_batch_size"] = min(plain["train"]["global_batch_size"], 4)
    plain["evaluate"] |= {"samples": 1, "limit": 1, "max_new_tokens": 16}
    if plain["data"]["validation"] is not None:
        plain["train"]["eval_steps"] = STEPS
    validation = plain["data"]["validation"]
    for source in [*plain["data"]["train"], *(validation if isinstance(validation, list) else [])]:
        source["limit"] = min(source["limit"] or ROWS, ROWS)
    return plain


def smoke(
    source: str | Path | Mapping[str, Any] | Recipe | None, overrides: Sequence[str], **display: Any
) -> dict[str, Any]:
    """Train `STEPS` steps, save, reload from disk and generate; leaves nothing behind.

    Returns {"loss", "validation_loss" (with validation data), "answer": text}. Raises what `fit` raises.
    """
    from rayft.train.driver import fit

    recipe = config.load(source, overrides).recipe
    with tempfile.TemporaryDirectory(prefix="rayft-smoke-") as storage:
        result = fit(shrunk(recipe, storage), **display)
        model, tokenizer = result.load()
        prompt = tokenizer("Hello", return_tensors="pt").to(model.device)
        ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    return {name: result.metrics[name] for name in ("loss", "validation_loss") if name in result.metrics} | {
        "answer": answer
    }
