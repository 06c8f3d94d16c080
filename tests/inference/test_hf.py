"""HFGenerator against transformers' own `generate`, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rayft.errors import UsageError
from rayft.inference import Prompt, Sampling
from rayft.inference.hf import HFGenerator, active_adapter

LENGTHS = [3, 17, 9, 1, 30, 9, 4, 22]


@pytest.fixture
def tokenizer(tiny_model_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def base(tiny_model_folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # greedy choices far apart, and not one token for ever
    return model


def lora(base: Any, name: str = "default", seed: int = 1) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(seed)
    if hasattr(base, "peft_config"):
        base.add_adapter(name, config)
        return base
    return get_peft_model(base, config, adapter_name=name)


def prompts(tokenizer: Any, adapter: str | None = None) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in LENGTHS]
    return [Prompt(tuple(row), adapter) for row in rows]


def stock(model: Any, prompt: Prompt, **arguments: Any) -> list[int]:
    """The tokens that transformers generates for this prompt alone."""
    ids = torch.tensor([list(prompt.ids)])
    was = model.training
    model.eval()
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **arguments)
    model.train(was)
    return answer[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_give_what_generate_gives_alone(base: Any, tokenizer: Any, batch_size: int) -> None:
    asked = prompts(tokenizer)
    answers = HFGenerator(base, tokenizer, batch_size=batch_size).generate(asked, Sampling(max_new_tokens=12))
    expected = [stock(base, prompt, max_new_tokens=12) for prompt in asked]
    assert [list(answer.ids) for answer in answers] == expected
    assert len({tuple(ids) for ids in expected}) == len(asked)  # the prompts matter
    assert [answer.text for answer in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_an_end_token_ends_an_answer(base: Any, tokenizer: Any) -> None:
    asked = prompts(tokenizer)[:4]
    free = [stock(base, prompt, max_new_tokens=12) for prompt in asked]
    end = free[0][4]  # a token that the first answer holds: let it be an end token of the model
    base.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    answers = HFGenerator(base, tokenizer).generate(asked, Sampling(max_new_tokens=12))
    for answer, ids in zip(answers, free, strict=True):
        stops = [i for i, token in enumerate(ids) if token in (end, tokenizer.eos_token_id)]
        assert list(answer.ids) == (ids[: stops[0] + 1] if stops else ids)
        assert answer.finish_reason == ("stop" if stops else "length")
        assert answer.text == tokenizer.decode(ids[: stops[0]] if stops else ids, skip_special_tokens=True)
    assert answers[0].finish_reason == "stop"
    assert answers[0].ids[-1] == end


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(base: Any, tokenizer: Any) -> None:
    asked = prompts(tokenizer)
    free = HFGenerator(base, tokenizer).generate(asked, Sampling(max_new_tokens=12))
    chosen = next(answer for answer in free if len(answer.text) > 5 and "�" not in answer.text)
    mark = chosen.text[3:5]
    answers = HFGenerator(base, tokenizer).generate(asked, Sampling(max_new_tokens=12, stop=(mark, "never seen")))
    for stopped, whole in zip(answers, free, strict=True):
        assert stopped.ids == whole.ids[: len(stopped.ids)]
        if mark in whole.text:
            assert stopped.finish_reason == "stop"
            assert stopped.text == whole.text[: whole.text.index(mark)]
        else:
            assert stopped == whole


def test_the_adapter_is_chosen_per_prompt(base: Any, tokenizer: Any) -> None:
    bare = [stock(base, prompt, max_new_tokens=6) for prompt in prompts(tokenizer)]
    model = lora(lora(base, "first", 1), "second", 2)
    mixed = [Prompt(prompt.ids, (None, "first", "second")[i % 3]) for i, prompt in enumerate(prompts(tokenizer))]
    answers = HFGenerator(model, tokenizer, batch_size=2).generate(mixed, Sampling(max_new_tokens=6))
    for i, (answer, prompt) in enumerate(zip(answers, mixed, strict=True)):
        if prompt.adapter is None:
            assert list(answer.ids) == bare[i]
        else:
            model.set_adapter(prompt.adapter)
            assert list(answer.ids) == stock(model, prompt, max_new_tokens=6)
            assert list(answer.ids) != bare[i]
    with pytest.raises(UsageError, match="R711") as error:
        HFGenerator(model, tokenizer).generate([Prompt((3,), "third")], Sampling())
    assert "third" in error.value.message


def test_the_model_is_left_as_it_was(base: Any, tokenizer: Any) -> None:
    model = lora(lora(base, "first", 1), "second", 2)
    model.train()
    model.base_model.model.model.norm.eval()
    model.config.use_cache = False
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    configuration = base.generation_config
    mixed = [Prompt((5, 6, 7), None), Prompt((5, 6), "second"), Prompt((5,), "first")]
    state = torch.random.get_rng_state()
    HFGenerator(model, tokenizer).generate(mixed, Sampling(max_new_tokens=2, temperature=1.0))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert [module.training for module in model.modules()] == modes
    assert model.active_adapter == "first"
    assert model.config.use_cache is False
    assert base.generation_config is configuration
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_generation_configuration_of_a_model_decides_nothing_but_the_end(base: Any, tokenizer: Any) -> None:
    asked = prompts(tokenizer)
    plain = HFGenerator(base, tokenizer).generate(asked, Sampling(max_new_tokens=8))
    base.generation_config = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=3.0, eos_token_id=tokenizer.eos_token_id
    )
    assert HFGenerator(base, tokenizer).generate(asked, Sampling(max_new_tokens=8)) == plain


def test_sampling_is_repeatable_and_follows_the_seed(base: Any, tokenizer: Any) -> None:
    generator, asked = HFGenerator(base, tokenizer), prompts(tokenizer)
    first = generator.generate(asked, Sampling(max_new_tokens=8, temperature=5.0, seed=1))
    assert generator.generate(asked, Sampling(max_new_tokens=8, temperature=5.0, seed=1)) == first
    assert generator.generate(asked, Sampling(max_new_tokens=8, temperature=5.0, seed=2)) != first
    greedy = generator.generate(asked, Sampling(max_new_tokens=8))
    assert generator.generate(asked, Sampling(max_new_tokens=8, temperature=5.0, top_p=1e-6)) == greedy
    # transformers would keep only the 50 most likely tokens by default
    flat = generator.generate([Prompt((5,))] * 16, Sampling(max_new_tokens=16, temperature=1e6))
    assert len({token for answer in flat for token in answer.ids}) > 100


def test_logprobs_are_those_of_one_forward_pass(base: Any, tokenizer: Any) -> None:
    asked = prompts(tokenizer)
    answers = HFGenerator(base, tokenizer).generate(asked, Sampling(max_new_tokens=7, temperature=3.0, logprobs=True))
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([[*prompt.ids, *answer.ids]])
        with torch.no_grad():
            logits = base.eval()(ids).logits[0, len(prompt.ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=2e-4)


def test_a_bf16_base_with_fp32_adapter_generates(tiny_model_folder: str, tokenizer: Any) -> None:
    model = lora(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    answers = HFGenerator(model, tokenizer).generate(prompts(tokenizer, "default"), Sampling(max_new_tokens=3))
    assert all(1 <= len(answer.ids) <= 3 for answer in answers)


def test_prefix_tuning_generates_as_alone(base: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    assert active_adapter(model) == "default"
    asked = prompts(tokenizer, "default")
    answers = HFGenerator(model, tokenizer, batch_size=3).generate(asked, Sampling(max_new_tokens=6))
    assert [list(answer.ids) for answer in answers] == [stock(model, prompt, max_new_tokens=6) for prompt in asked]


def test_nothing_asked_nothing_answered(base: Any, tokenizer: Any) -> None:
    assert HFGenerator(base, tokenizer).generate([], Sampling()) == []
    assert active_adapter(base) is None
