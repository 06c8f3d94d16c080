"""Other decoders than Llama, unmodified: the engine answers as their own `generate` does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rayft.config.model import Model
from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.inference.request import Request, SamplingParams
from rayft.inference.settings import EngineSettings
from rayft.models.load import load_model, quantization_config
from rayft.models.save import ADAPTER_WEIGHTS
from tests.inference.oracle import Reference, judged, random_prompt
from tests.inference.test_engine import ask, finish

TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 9},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "llama": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
}


def tiny(kind: str, **fields: Any) -> Any:
    """A random model of this kind; eager, since stock sdpa leaves Gemma-2's soft cap out."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(TINY | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_generate(kind: str, tokenizer: Any) -> None:
    model = tiny(kind, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    prompts = [random_prompt(generator, 384, 45) for _ in range(8)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        expected.append(output[0, len(prompt) :].tolist())
        assert model(ids).logits.isfinite().all()
    assert len({tuple(answer) for answer in expected}) > len(prompts) / 2
    engine = Engine(model, tokenizer, EngineSettings(max_num_seqs=5, max_num_batched_tokens=16))
    answers = [ask(engine, Request(str(i), p, sampling=SamplingParams(12))) for i, p in enumerate(prompts)]
    finish(engine)
    assert model.config._attn_implementation == "eager"  # as it was
    for prompt, answer, reference in zip(prompts, answers, expected, strict=True):
        if answer.ids != reference:
            logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
            assert judged(answer.ids, logits).same, kind


def test_windows_matter(tokenizer: Any) -> None:
    """A model whose window is wide answers otherwise: the tests above can fail."""
    prompt = random_prompt(torch.Generator().manual_seed(1), 384, 45)
    ids = []
    for window in (9, 500):
        engine = Engine(tiny("mistral", sliding_window=window), tokenizer)
        answer = ask(engine, Request("1", prompt * 2, sampling=SamplingParams(12)))
        finish(engine)
        ids.append(answer.ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
        ("gpt_oss", {"num_local_experts": 2, "sliding_window": 8}, "more than plain attention"),
        ("gemma3_text", {"sliding_window": 8, "use_bidirectional_attention": True}, "more than plain attention"),
        ("mamba2", {"num_heads": 4, "n_groups": 1, "expand": 1, "state_size": 8}, "layers"),
    ],
)
def test_what_the_engine_cannot_compute_exactly_is_refused(
    kind: str, fields: dict[str, Any], reason: str, tokenizer: Any
) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        Engine(tiny(kind, **fields), tokenizer)
    assert error.value.id == "R814"


def test_bf16_answers_and_its_logits_are_close(tokenizer: Any) -> None:
    model = tiny("qwen3").to(torch.bfloat16)
    prompt = random_prompt(torch.Generator().manual_seed(1), 384, 45)
    engine = Engine(model, tokenizer, EngineSettings(max_num_batched_tokens=64))
    answer = ask(engine, Request("1", prompt, sampling=SamplingParams(8, logprobs=True)))
    finish(engine)
    logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    assert [event.logprob for event in answer.events] == pytest.approx(expected.tolist(), abs=0.3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_with_adapters(
    quantization: Any, tiny_model_folder: str, peft: Reference, tokenizer: Any, tmp_path: Path
) -> None:
    """Stock PEFT on the same quantised weights. int8 rounds activations by the row, so neighbours change nothing."""
    config = quantization_config(Model(base=tiny_model_folder, quantization=quantization), torch.float32)
    base = load_model(tiny_model_folder, quantization=config)
    stock = load_model(tiny_model_folder, quantization=config)
    for model in (base, stock):
        model.lm_head.weight.data.mul_(8)
    state = peft.states["gina"]
    state.config.save_pretrained(str(tmp_path))
    save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, tmp_path / ADAPTER_WEIGHTS)
    adapted = PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    engine = Engine(base, tokenizer, EngineSettings(max_num_seqs=4, max_num_batched_tokens=32))
    engine.register(tmp_path, "gina")
    generator = torch.Generator().manual_seed(1)
    prompts = [random_prompt(generator, len(tokenizer), 40) for _ in range(6)]
    answers = [
        ask(engine, Request(str(i), p, (None, "gina")[i % 2], sampling=SamplingParams(6)))
        for i, p in enumerate(prompts)
    ]
    finish(engine)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad(), nullcontext() if i % 2 else adapted.disable_adapter():
            logits = adapted(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        assert judged(answer.ids, logits).same
