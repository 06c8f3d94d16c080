"""The loss against transformers' own, the answers against a generator that knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rayft.errors import UsageError
from rayft.evaluate import answers as answers_module
from rayft.evaluate import evaluate_model
from rayft.evaluate.measure import loss_sums
from rayft.evaluate.questions import without_frame
from rayft.inference import Completion, Prompt, Sampling
from rayft.inference.hf import HFGenerator

Make = Callable[..., tuple[Any, Any, Any, Any]]
Loss = Callable[[Any, Any], float]


@pytest.mark.parametrize(
    ("method", "padding_free"), [("lora", "true"), ("lora", "false"), ("prompt", "false"), ("prefix", "false")]
)
def test_loss_of_both_sides_is_that_of_transformers(
    prepared: Make, stock_loss: Loss, method: str, padding_free: str
) -> None:
    recipe, model, tokenizer, data = prepared(f"adapter.method={method}", f"data.padding_free={padding_free}")
    examples = data.split("validation")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.base)
    model.train()
    forward = vars(model).get("forward")
    for bare, reference in ((True, base), (False, model), (True, base)):
        total, weight = loss_sums(model, examples, range(len(examples)), recipe, tokenizer, bare=bare)
        assert model.training
        if bare:
            assert total / weight == pytest.approx(stock_loss(reference, examples), rel=1e-5)
        else:
            tuned = stock_loss(reference, examples)
            model.train()
            assert total / weight == pytest.approx(tuned, rel=1e-5)
    if method == "lora":  # PEFT itself leaves a `forward` behind when it switches virtual tokens off
        assert vars(model).get("forward") == forward
    assert tuned != pytest.approx(stock_loss(base, examples), rel=1e-3)


def test_shares_add_up(prepared: Make) -> None:
    recipe, model, tokenizer, data = prepared("data.prompt_loss_weight=0.25")
    examples = data.split("validation")
    whole = loss_sums(model, examples, range(5), recipe, tokenizer)
    parts = [loss_sums(model, examples, share, recipe, tokenizer) for share in ([0, 2, 4], [1, 3], [])]
    assert [sum(numbers) for numbers in zip(*parts, strict=True)] == pytest.approx(whole, rel=1e-6)
    assert whole[1] == pytest.approx(float(examples.weight_sums.sum()))


class Knowing:
    """A generator that knows the references of all questions but one."""

    def __init__(self, data: Any, wrong: int) -> None:
        self.known = {tuple(row["prompt_ids"]): row["reference"] for row in data.prompts()}
        self.known[tuple(data.prompts()[wrong]["prompt_ids"])] = "no idea"
        self.asked: list[list[Prompt]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        assert sampling.temperature == 0
        self.asked.append(list(prompts))
        return [Completion((1,), f" {self.known[tuple(prompt.ids)]}\n", "stop") for prompt in prompts]


def test_evaluate_model_scores_what_the_generator_answers(prepared: Make) -> None:
    recipe, model, tokenizer, data = prepared()
    generator = Knowing(data, wrong=1)
    result = evaluate_model(model, tokenizer, data, recipe, generator)
    assert result["metrics"] == {"exact_match": 0.8}
    assert result["perplexity"] == pytest.approx(math.exp(result["validation_loss"]))
    assert [sample["text"].strip() for sample in result["samples"]] == [result["samples"][0]["reference"], "no idea"]
    assert [sample["prompt"] for sample in result["samples"]] == [
        "What is the weather like in Paris?",
        "What is the weather like in Oslo??",
    ]
    assert {prompt.adapter for batch in generator.asked for prompt in batch} == {"default"}
    assert [len(batch) for batch in generator.asked] == [2, 2, 1]


def test_limit_bounds_the_answers_and_not_the_loss(prepared: Make, stock_loss: Loss) -> None:
    recipe, model, tokenizer, data = prepared("evaluate.limit=2", "evaluate.samples=9")
    generator = Knowing(data, wrong=1)
    result = evaluate_model(model, tokenizer, data, recipe, generator)
    assert result["metrics"] == {"exact_match": 0.5}
    assert len(result["samples"]) == 2
    assert result["validation_loss"] == pytest.approx(stock_loss(model, data.split("validation")), rel=1e-5)


def test_answers_during_training(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model, tokenizer, data = prepared()
    alone = answers_module.answer(model, tokenizer, data, recipe, 0, 1)
    assert set(alone["scalars"]) == {"exact_match"}
    first = data.prompts()[0]
    generator = HFGenerator(model, tokenizer)
    [expected] = generator.generate([Prompt(first["prompt_ids"], "default")], Sampling(max_new_tokens=6))
    assert alone["samples"][0]["text"] == expected.text
    assert alone["samples"][0]["reference"] == first["reference"]

    shares: list[Any] = []  # two workers, one after the other; the second pass knows both shares

    def gather(target: list[Any], mine: Any) -> None:
        shares.append(mine)
        target[:] = shares[:2] if len(shares) >= 2 else [mine, {i: "" for i in range(5)} | mine]

    monkeypatch.setattr(answers_module.dist, "all_gather_object", gather)
    for rank in (0, 1, 0):
        together = answers_module.answer(model, tokenizer, data, recipe, rank, 2)
    assert sorted([*shares[0], *shares[1]]) == [0, 1, 2, 3, 4]
    assert together == alone


def test_nothing_wanted_nothing_generated(prepared: Make) -> None:
    recipe, model, tokenizer, data = prepared("evaluate.metrics=[]", "evaluate.samples=0")
    assert answers_module.answer(model, tokenizer, data, recipe, 0, 1) == {"scalars": {}, "samples": []}


def test_metrics_without_answers_are_refused(prepared: Make, tmp_path: Any) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "no chat at all"}\n' * 3)
    recipe, model, tokenizer, data = prepared("train.objective=clm", f"data.train={text}", f"data.validation={text}")
    with pytest.raises(UsageError, match="R704") as error:
        evaluate_model(model, tokenizer, data, recipe, HFGenerator(model, tokenizer))
    assert "exact_match" in error.value.message


def test_the_frame_of_all_prompts_is_not_shown() -> None:
    frame = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for texts in (["Hi there", "Hit it"], ["a\nb x", "a\nc x"], ["Where is A?", "Where is B?", "Where is it?"]):
        shown = without_frame([frame.format(text) for text in texts])
        assert all(text.endswith(end) for text, end in zip(texts, shown, strict=True))
        assert shown == (texts if texts[0] != "a\nb x" else ["b x", "c x"])
    assert without_frame(["alone"]) == ["alone"]
    assert without_frame([]) == []
