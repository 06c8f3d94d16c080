"""The peer: Hugging Face's Trainer with stock PEFT and without Ray, padding each batch to its longest row.

The benchmarks run it as a process of its own, which does one optimiser step whenever a line arrives on standard input
and answers with a line (memory so far) when the step has ended.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import memory
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from rayft.data import Prepared
from rayft.data.examples import Examples
from rayft.data.plan import step_plan


class InOrder(Trainer):
    """Takes the rows as they come: both sides train on the same batches."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Gate(TrainerCallback):
    """Says that a step has ended, and waits for leave to do the next one."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        print(json.dumps(memory.figures()), file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            sys.exit()


class Rows(torch.utils.data.Dataset):
    """The prepared examples in the order of the step plan; what is not supervised has the label -100."""

    def __init__(self, examples: Any, order: list[int]) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.examples[self.order[index]]
        ids = row["input_ids"].tolist()
        labels = [i if weight else -100 for i, weight in zip(ids, row["loss_weights"].tolist(), strict=True)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def examples_of(data: str) -> Examples:
    """The training examples of a prepared folder."""
    examples = Prepared(data, "").split("train")
    assert examples is not None
    return examples


def make_trainer(
    kind: type[InOrder],
    *,
    base: str,
    data: str,
    scratch: str,
    steps: int,
    batch: int,
    seed: int,
    lora: dict[str, Any],
    learning_rate: float,
    callbacks: Sequence[TrainerCallback],
    save_steps: int | None,
) -> Trainer:
    """The Trainer with stock PEFT, bf16 autocast, on `steps` steps of the plan that rayft follows. `lora`: of
    LoraConfig. `save_steps` None: no checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = examples_of(data)
    epochs = math.ceil(steps * batch / len(examples))
    order = [
        index for epoch in range(epochs) for step in step_plan(examples.lengths, batch, seed, epoch) for index in step
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.config.use_cache = False
    memory.watch_logits(model.config.vocab_size)
    return kind(
        model=get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)),
        args=Arguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no" if save_steps is None else "steps",
            save_steps=save_steps or steps,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Rows(examples, order),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=list(callbacks),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--chunked", action="store_true", help="with rayft's loss, and nothing else of it")
    options = vars(parser.parse_args())
    sys.stdout = sys.stderr
    torch.set_num_threads(options.pop("threads"))
    kind = Chunked if options.pop("chunked") else InOrder
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    make_trainer(kind, **options, lora=lora, learning_rate=2e-4, callbacks=[Gate()], save_steps=10).train()


class Chunked(InOrder):
    """The same with rayft's loss: logits of supervised rows only, a chunk at a time."""

    def __init__(self, *, model: Any, **arguments: Any) -> None:
        from rayft.objectives import causal

        causal.install(model)
        super().__init__(model=model, **arguments)

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        labels = inputs.pop("labels")
        weights = (labels != -100).float()
        loss: torch.Tensor = model(**inputs, loss_weights=weights).loss / weights.sum()
        return loss


if __name__ == "__main__":
    main()
