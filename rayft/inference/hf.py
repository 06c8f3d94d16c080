"""The plain generator: Hugging Face's `generate` on a model in memory. The reference for faster ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rayft.errors import UsageError
from rayft.inference.generator import Completion, Prompt, Sampling
from rayft.models.load import DTYPES, compute_context


def active_adapter(model: nn.Module) -> str | None:
    """The `Prompt.adapter` with which the model answers as it stands; None for a model without adapter."""
    return model.active_adapter if isinstance(model, PeftModel) else None


class HFGenerator:
    """Answers in batches of prompts of similar length, padded on the left. Leaves the model as it was.

    Greedy answers in fp32 do not depend on the batch. What a model's `generation_config` recommends (temperature,
    repetition penalty) is not applied: only `Sampling` decides; its end tokens are.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16, dtype: str | None = None
    ) -> None:
        """model: a causal LM or the `PeftModel` around one. dtype: number format of the computation (bf16, fp16, fp32);
        that of the embeddings by default."""
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.causal = model.get_base_model() if isinstance(model, PeftModel) else model
        weights = self.causal.get_input_embeddings().weight
        self.device = weights.device
        self.dtype = dtype or next((name for name, kind in DTYPES.items() if kind == weights.dtype), "fp32")
        self.end_ids = end_ids(self.causal, tokenizer)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises:
            UsageError: R711 a prompt names an adapter that the model does not have.
        """
        names = {prompt.adapter for prompt in prompts if prompt.adapter is not None}
        if missing := sorted(names - set(getattr(self.model, "peft_config", {}))):
            raise UsageError("R711", f"the model in memory has no adapter {', '.join(missing)}")
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].adapter or "", -len(prompts[i].ids)))
        completions: dict[int, Completion] = {}
        with torch.no_grad(), _as_it_was(self.model, self.causal), self._seeded(sampling.seed):
            for adapter, group in groupby(order, key=lambda i: prompts[i].adapter):
                members = list(group)
                with self._answering(adapter):
                    for start in range(0, len(members), self.batch_size):
                        indices = members[start : start + self.batch_size]
                        answers = self._batch([prompts[i].ids for i in indices], sampling)
                        completions.update(zip(indices, answers, strict=True))
        return [completions[i] for i in range(len(prompts))]

    def _batch(self, prompts: list[Sequence[int]], sampling: Sampling) -> Iterator[Completion]:
        width = max(map(len, prompts))
        pad = self._pad_id()
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        self.causal.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            top_k=0,
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=pad,
            stop_strings=list(sampling.stop) or None,
            use_cache=True,
            output_logits=sampling.logprobs,
            return_dict_in_generate=True,
        )
        with compute_context(self.dtype, self.device.type):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, tokenizer=self.tokenizer if sampling.stop else None
            )
        answers = output.sequences[:, width:].tolist()
        for row, answer in enumerate(answers):
            kept, text, ended = self._ended(answer, sampling.stop)
            logprobs = _logprobs(output.logits, row, kept) if sampling.logprobs else None
            yield Completion(tuple(kept), text, "stop" if ended else "length", logprobs)

    def _ended(self, ids: list[int], stop: tuple[str, ...]) -> tuple[list[int], str, bool]:
        """(ids up to the one that ended the answer, its text, whether it ended by itself)."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        answer = ids if end is None else ids[:end]
        text = self._text(answer)
        if any(mark in text for mark in stop):
            count = next(n for n in range(1, len(answer) + 1) if any(mark in self._text(answer[:n]) for mark in stop))
            text = self._text(answer[:count])
            return answer[:count], text[: min(text.index(mark) for mark in stop if mark in text)], True
        return (ids, text, False) if end is None else (ids[: end + 1], text, True)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _pad_id(self) -> int:
        """Padding is masked, so any id will do."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.end_ids, default=0)

    @contextmanager
    def _answering(self, adapter: str | None) -> Iterator[None]:
        """The adapter of that name alone, or none of them."""
        if not isinstance(self.model, PeftModel):
            yield
        elif adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            former = self.model.active_adapter
            if adapter != former:
                self.model.set_adapter(adapter)
            yield
            if adapter != former:
                self.model.set_adapter(former)

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own configuration (Llama-3 has three)."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}


def _logprobs(logits: tuple[torch.Tensor, ...], row: int, ids: list[int]) -> tuple[float, ...]:
    """logits: one [B, V] per generated token."""
    steps = torch.stack([step[row] for step in logits[: len(ids)]]).float().log_softmax(-1)
    return tuple(steps.gather(-1, torch.tensor(ids, device=steps.device)[:, None])[:, 0].tolist())


@contextmanager
def _as_it_was(model: nn.Module, causal: Any) -> Iterator[None]:
    """Evaluation mode; afterwards every module's mode, every parameter's `requires_grad` (PEFT sets it when adapters
    are switched) and the generation configuration are as before."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configuration = causal.generation_config
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in trainable:
            parameter.requires_grad = flag
        causal.generation_config = configuration
