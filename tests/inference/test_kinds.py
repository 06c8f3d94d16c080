"""Requests with adapters of every kind in the same steps, each answered as stock PEFT answers it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rayft.config.model import Model
from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.inference.request import Request, SamplingParams
from rayft.inference.settings import EngineSettings
from rayft.models.load import load_model, quantization_config
from rayft.multilora.bank import AdapterState
from tests.inference.oracle import judged, random_prompt, sharpened
from tests.inference.test_engine import Answer, ask, finish
from tests.multilora.kinds import CONFIGS, Stock, stock


@pytest.fixture(scope="module")
def kinds(tiny_model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return stock(lambda: sharpened(tiny_model_folder), CONFIGS, tmp_path_factory.mktemp("kinds"))


def engine_of(model: Any, tokenizer: Any, kinds: Stock, **settings: Any) -> Engine:
    engine = Engine(model, tokenizer, EngineSettings(**settings))
    for name, state in kinds.states.items():
        engine.register(state, name)
    return engine


def check(engine: Engine, kinds: Stock, vocabulary: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(1)
    names = [*kinds.states, None] * rounds
    order = torch.randperm(len(names), generator=generator).tolist()
    asked: list[tuple[Request, Answer]] = []
    for number in order:
        prompt = random_prompt(generator, min(vocabulary, 300), 40)
        request = Request(str(number), prompt, names[number], sampling=SamplingParams(8, ignore_eos=True))
        asked.append((request, ask(engine, request)))
        if number % 3 == 0:
            engine.step()
    finish(engine)
    same_as_base = 0
    for request, answer in asked:
        ids = torch.tensor([[*request.prompt, *answer.ids]])
        span = slice(len(request.prompt) - 1, -1)
        assert judged(answer.ids, kinds.logits(ids, request.adapter)[0, span]).same, request.adapter
        if request.adapter is not None:
            same_as_base += judged(answer.ids, kinds.logits(ids, None)[0, span]).same
    assert same_as_base < len(asked) / 4


def test_a_mix_of_all_kinds_is_answered_as_by_peft_alone(tiny_model_folder: str, kinds: Stock, tokenizer: Any) -> None:
    """Adapters come and go, since there are slots for a third of them, and the head sees a part of each step's rows."""
    engine = engine_of(
        sharpened(tiny_model_folder), tokenizer, kinds, max_loras=4, max_num_seqs=6, max_num_batched_tokens=48
    )
    check(engine, kinds, len(tokenizer), rounds=5)
    plain = [ask(engine, Request(str(i), (5, 6, 7), (None, "plain")[i % 2])) for i in range(4)]
    finish(engine)
    assert plain[0].ids != plain[1].ids
    assert not engine.mlora.overlays._laid  # batches without such adapters run the base's own code


@pytest.mark.parametrize("name", [*CONFIGS])
def test_strength_scales_what_an_adapter_does(tiny_model_folder: str, kinds: Stock, tokenizer: Any, name: str) -> None:
    """At 0 it is the base, bit for bit; in general its weights are the base's and ``strength`` of the way to those that
    PEFT would merge."""
    engine = Engine(sharpened(tiny_model_folder), tokenizer)
    engine.register(kinds.states[name], name)
    prompt = random_prompt(torch.Generator().manual_seed(2), 300, 30)
    sampling = SamplingParams(6, ignore_eos=True, logprobs=True)
    strengths = (0.0, 0.3, 1.0, 1.5)
    asked = [ask(engine, Request(str(s), prompt, name, s, sampling)) for s in strengths]
    base = ask(engine, Request("base", prompt, sampling=sampling))
    finish(engine)
    assert [(e.token, e.logprob) for e in asked[0].events] == [(e.token, e.logprob) for e in base.events]
    merged = copy.deepcopy(kinds.models[name]).merge_and_unload().state_dict()
    between = sharpened(tiny_model_folder)
    bare = {key: weight.clone() for key, weight in between.state_dict().items()}
    for strength, answer in zip(strengths, asked, strict=True):
        between.load_state_dict({key: torch.lerp(weight, merged[key], strength) for key, weight in bare.items()})
        with torch.no_grad():
            logits = between(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        assert judged(answer.ids, logits).same
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert [event.logprob for event in answer.events] == pytest.approx(expected.tolist(), abs=2e-4)
    assert len({tuple(event.logprob for event in answer.events) for answer in asked}) == len(strengths)


def test_bf16_weights_that_are_packed(tiny_model_folder: str, kinds: Stock, tokenizer: Any) -> None:
    """DoRA's lengths are read from them, whole modules are packed as well, and logits are near those of fp32."""
    engine = engine_of(sharpened(tiny_model_folder).to(torch.bfloat16), tokenizer, kinds, max_loras=len(CONFIGS))
    prompt = random_prompt(torch.Generator().manual_seed(4), 300, 60)
    sampling = SamplingParams(10, logprobs=True, ignore_eos=True)
    answers = {name: ask(engine, Request(name, prompt, name, sampling=sampling)) for name in CONFIGS}
    finish(engine)
    for name, answer in answers.items():
        ids = torch.tensor([[*prompt, *answer.ids]])

        def distance(adapter: str | None, ids: torch.Tensor = ids, answer: Answer = answer) -> float:
            expected = kinds.logits(ids, adapter)[0, len(prompt) - 1 : -1].log_softmax(-1)
            own = expected.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            return float((own - torch.tensor([event.logprob for event in answer.events])).abs().mean())

        assert distance(name) < 0.3, name
        assert distance(None) > 3 * distance(name), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases(quantization: Any, tiny_model_folder: str, tokenizer: Any, tmp_path: Path) -> None:
    """Stock PEFT on the same quantised weights. It loses the scales of 8-bit ones under DoRA on a CPU; what the engine
    takes for them is in `tests/multilora/test_lengths.py`."""
    config = quantization_config(Model(base=tiny_model_folder, quantization=quantization), torch.float32)

    def load() -> Any:
        model = load_model(tiny_model_folder, quantization=config)
        model.lm_head.weight.data.mul_(8)
        return model

    names = ["plain", "dora", "small dora", "whole head", "whole norms", "embedding", "tokens"]
    if quantization == "int8":
        names = [name for name in names if "dora" not in name]
    reference = stock(load, {name: CONFIGS[name] for name in names}, tmp_path)
    engine = engine_of(load(), tokenizer, reference, max_num_seqs=5, max_num_batched_tokens=32)
    check(engine, reference, len(tokenizer), rounds=2)


def tensor(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.1)


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "a larger vocabulary": ({"lm_head.weight": tensor(999, 64)}, "R802", "a vocabulary of 999 tokens in lm_head"),
    "a bias": ({"lm_head.bias": tensor(3)}, "R803", "lm_head has no bias"),
    "an unknown module": ({"score.weight": tensor(2, 64)}, "R803", "no module score"),
    "another width": ({"model.norm.weight": tensor(32)}, "R803", r"model.norm takes \(64,\), not \(32,\)"),
    "one matrix": ({"lm_head.lora_A.weight": tensor(4, 64)}, "R803", "lm_head has no A"),
    "another base": ({"model.embed_tokens.base_layer.weight": tensor(1, 64)}, "R802", "vocabulary of 1 token"),
    "a norm with LoRA": (
        {"model.norm.lora_A.weight": tensor(4, 64), "model.norm.lora_B.weight": tensor(64, 4)},
        "R803",
        r"model.norm has no A",
    ),
    "LoRA and a copy": (
        {
            "lm_head.lora_A.weight": tensor(4, 64),
            "lm_head.lora_B.weight": tensor(384, 4),
            "lm_head.weight": tensor(384, 64),
        },
        "R802",
        r"lm_head.weight beside LoRA",
    ),
    "tokens that are not named": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": tensor(3, 64)},
        "R803",
        "its trainable_token_indices",
    ),
    "a magnitude of another size": (
        {
            "lm_head.lora_A.weight": tensor(4, 64),
            "lm_head.lora_B.weight": tensor(300, 4),
            "lm_head.lora_magnitude_vector": tensor(7),
        },
        "R803",
        "lm_head takes",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED])
def test_what_does_not_fit_is_refused(case: str, tiny_model_folder: str, kinds: Stock, tokenizer: Any) -> None:
    tensors, id, message = REFUSED[case]
    state = AdapterState(
        kinds.states["plain"].config, {f"base_model.model.{name}": value for name, value in tensors.items()}
    )
    engine = Engine(sharpened(tiny_model_folder), tokenizer)
    with pytest.raises(UsageError, match=message) as error:
        engine.register(state, "bot")
    assert error.value.id == id
    assert not engine.adapters.names and not engine.mlora.slots


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [3, 384]}, "trains token 384"),
        ({"trainable_token_indices": [-1, 3]}, "trains token -1"),
        ({"alora_invocation_tokens": [3]}, "the setting alora_invocation_tokens"),
    ],
)
def test_settings_that_are_refused(
    fields: dict[str, Any], message: str, tiny_model_folder: str, tokenizer: Any
) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    engine = Engine(sharpened(tiny_model_folder), tokenizer)
    with pytest.raises(UsageError, match=message) as error:
        engine.register(
            AdapterState(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **fields), {name: tensor(2, 64)}),
            "bot",
        )
    assert error.value.id == "R802"


def test_a_base_with_other_weights_is_noticed(tiny_model_folder: str, kinds: Stock, tokenizer: Any) -> None:
    """PEFT saves the base's embedding beside LoRA on it, and would put it in the base's place."""
    state = kinds.states["embedding"]
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in state.tensors
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    engine = Engine(model, tokenizer)
    engine.register(state, "bot")
    other = AdapterState(state.config, {**state.tensors, name: state.tensors[name] * 1.1})
    with pytest.raises(UsageError, match="other base weights for") as error:
        engine.register(other, "bot")
    assert error.value.id == "R802"
