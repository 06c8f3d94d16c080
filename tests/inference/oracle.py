"""Adapters on a tiny model, and what stock PEFT answers with one of them, alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rayft.multilora.bank import AdapterState

CLOSE = 1e-5
"""Two logits that are closer may change places when a batch is computed in another order."""


def sharpened(folder: str) -> Any:
    """The base with greedy choices far apart, and not one token for ever."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


@dataclass
class Reference:
    """Stock PEFT with several adapters on one base."""

    model: Any
    states: dict[str, AdapterState]

    def answer(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> list[int]:
        """What `generate` answers to this prompt alone, greedily, never ended by an end token before ``tokens``."""
        ids = torch.tensor([list(prompt)])
        arguments: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
        with self.answering(adapter):
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **arguments
            )
        return output[0, len(prompt) :].tolist()

    def logits(self, prompt: Sequence[int], answer: Sequence[int], adapter: str | None) -> torch.Tensor:
        """float32[len(answer), vocabulary]: what each token of the answer is chosen from, in one forward pass."""
        with self.answering(adapter), torch.no_grad():
            ids = torch.tensor([[*prompt, *answer]])
            return self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        if adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            if self.model.active_adapter != adapter:
                self.model.set_adapter(adapter)
            yield


@dataclass(frozen=True)
class Verdict:
    """How an answer compares with greedy decoding under some logits [n, vocabulary]."""

    same: bool
    """Every token is the most likely one, or so close to it (`CLOSE`) that it could be."""
    undecided: bool
    """Some token is not the most likely one, but close."""


def judged(answer: Sequence[int], logits: torch.Tensor) -> Verdict:
    """``answer`` is what `generate` gives just when each of its tokens is the most likely one after those before it."""
    gap = logits.amax(-1) - logits.gather(1, torch.tensor([*answer])[:, None])[:, 0]
    return Verdict(bool((gap < CLOSE).all()), bool((gap > 0).any()))


def reference(base: Any, ranks: dict[str, int]) -> Reference:
    """Random adapters by name, of these ranks, each strong enough to change most answers."""
    model = None
    for number, (name, rank) in enumerate(ranks.items()):
        torch.manual_seed(100 + number)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear" if number % 2 else ["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.eval()
    states = {
        name: AdapterState(model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name))
        for name in ranks
    }
    return Reference(model, states)


def random_prompt(generator: torch.Generator, vocabulary: int, longest: int) -> tuple[int, ...]:
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())
