"""One small byte-level tokenizer that knows the control tokens of all our test templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rayft.config.recipe import Recipe

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
    "[/AVAILABLE_TOOLS]",
]
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
BORDERS = {
    "chatml": (None, "<|im_end|>"),
    "chatml_generation": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"),
}
"""Template -> bos and eos token of the tokenizer it comes with."""
CORPUS = [
    "What is the weather in Paris today? It is sunny, with a little rain in the evening.",
    "You are a helpful assistant. Answer with one word and nothing else.\n\n",
    'Sure! {"name": "weather", "arguments": {"city": "Paris", "days": 2}} user assistant system model tool',
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """``make_tokenizer(template=None, adds_bos=False)``: a new tokenizer, with the named chat template or with none."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_tokens(ORDINARY)

    def make(template: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerBase:
        bos, eos = BORDERS[template] if template else ("<s>", "</s>")
        own = Tokenizer.from_str(bpe.to_str())
        # As byte-level tokenizers of the field do: offsets leave out the space before a word.
        own.post_processor = processors.ByteLevel(trim_offsets=True)
        if adds_bos:
            own.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, own.token_to_id(bos))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=own,
            bos_token=bos,
            eos_token=eos,
            pad_token="<pad>",
            clean_up_tokenization_spaces=False,
            chat_template=(TEMPLATES / f"{template}.jinja").read_text() if template else None,
        )

    return make


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """``make_recipe(train, **data)``: a recipe whose data section has these keys; ``seed`` and ``objective`` too."""

    def make(train: Any, *, seed: int = 17, objective: str = "sft", **data: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"base": "none"},
                "seed": seed,
                "train": {"objective": objective},
                "data": {"train": train, **data},
            }
        )

    return make
