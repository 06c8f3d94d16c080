"""Several LoRA adapters trained in this process on one base: as one pack, or one after another in stock PEFT.

`tune.py` runs it as a process of its own, which does one optimiser step of every adapter whenever a line arrives on
standard input and answers with a line (memory so far, losses of the step) when the step has ended.

    python benchmarks/adapters.py pack|sequential '{"recipes": [...], "base": ..., "data": ..., "steps": 9, ...}'
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import memory
import torch

from rayft import config
from rayft.config.recipe import Recipe
from rayft.data import Prepared

Round = Callable[[], dict[str, float]]
"""One optimiser step of every adapter; returns its loss by name."""


def pack(recipes: list[Recipe], base: str, data: str) -> Round:
    """rayft's way: all adapters in one forward and one backward pass."""
    from rayft.multilora.pack import Pack

    together = Pack.open(recipes[0], base, device="cpu")
    for recipe in recipes:
        together.join(recipe.name, recipe, Prepared(data, ""))
    return lambda: {report.trial: report.loss for report in together.step()}


def sequential(recipes: list[Recipe], base: str, data: str) -> Round:
    """Stock PEFT and a plain loop: one adapter at a time, on the same base."""
    from hf_trainer import examples_of
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    from rayft.data.plan import step_plan

    examples = examples_of(data)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.config.use_cache = False
    optimizers, schedules, parameters, plans = {}, {}, {}, {}
    for recipe in recipes:
        lora = LoraConfig(**lora_of(recipe), task_type="CAUSAL_LM")
        torch.manual_seed(recipe.seed)  # so that both ways start with the same weights
        if hasattr(model, "peft_config"):
            model.add_adapter(recipe.name, lora)
        else:
            model = get_peft_model(model, lora, adapter_name=recipe.name)
        model.set_adapter(recipe.name)
        parameters[recipe.name] = [p for p in model.parameters() if p.requires_grad]
        settings = {"lr": recipe.train.learning_rate, "weight_decay": recipe.train.weight_decay}
        optimizers[recipe.name] = torch.optim.AdamW(parameters[recipe.name], **settings)
        total = recipe.train.max_steps
        warmup = math.ceil(recipe.train.warmup_steps * total)  # a share, as in the recipes of `configurations.py`
        schedules[recipe.name] = get_scheduler(recipe.train.lr_scheduler_type, optimizers[recipe.name], warmup, total)
        plans[recipe.name] = iter(step_plan(examples.lengths, recipe.train.global_batch_size, recipe.seed, 0))
    model.train()

    def step(name: str) -> float:
        model.set_adapter(name)
        rows = [examples[index] for index in next(plans[name])]
        ids = torch.stack([torch.from_numpy(row["input_ids"].astype("int64")) for row in rows])
        weights = torch.stack([torch.from_numpy(row["loss_weights"].copy()) for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids.masked_fill(weights == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters[name], 1.0)
        optimizers[name].step()
        schedules[name].step()
        optimizers[name].zero_grad()
        return float(loss.detach())

    return lambda: {recipe.name: step(recipe.name) for recipe in recipes}


def lora_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's adapter in the words of LoraConfig."""
    adapter = recipe.adapter
    assert adapter is not None
    modules = adapter.target_modules
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": modules if isinstance(modules, str) else list(modules),
    }


def main() -> None:
    way, options = {"pack": pack, "sequential": sequential}[sys.argv[1]], json.loads(sys.argv[2])
    output, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(options.pop("threads"))
    recipes = [config.load(recipe).recipe for recipe in options.pop("recipes")]
    steps = options.pop("steps")
    do_round = way(recipes, **options)
    for _ in range(steps):
        losses = do_round()
        print(json.dumps({**memory.figures(), "losses": losses}), file=output, flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
