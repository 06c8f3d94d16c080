"""`score`: from a reference, a folder or a recipe to the numbers of the base and of the tuned model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.errors import UsageError
from rayft.evaluate import Score, score
from rayft.runs.folder import RunFolder

Run = Callable[..., RunFolder]
Loss = Callable[[Any, Any], float]


def rendered(result: Score) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(result.to_rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


def heldout(result: Score, storage: str) -> Any:
    from rayft.data import Examples

    [file] = Path(storage, ".cache", "data").glob("*/validation.arrow")
    assert len(Examples(file)) == result.examples
    return Examples(file)


def test_a_run_is_scored_against_its_base(finished_run: Run, plain: dict[str, Any], stock_loss: Loss) -> None:
    run = finished_run()
    storage = plain["storage"]
    result = score("run:tiny", [f"storage={storage}"], quiet=True)

    base = AutoModelForCausalLM.from_pretrained(plain["model"]["base"])
    examples = heldout(result, storage)
    assert result.base is not None and result.tuned is not None
    assert result.base.validation_loss == pytest.approx(stock_loss(base, examples), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(f"{run.path}/adapter")
    tuned = PeftModel.from_pretrained(base, f"{run.path}/adapter")
    assert result.tuned.validation_loss == pytest.approx(stock_loss(tuned, examples), rel=1e-5)
    assert result.tuned.validation_loss != pytest.approx(result.base.validation_loss, rel=1e-3)

    assert (result.examples, result.answers, len(result.samples)) == (5, 5, 2)
    assert (result.kind, result.path) == ("adapter", f"{run.path}/adapter")
    for sample in result.samples:
        text = (
            f"<|im_start|>system\nAnswer with JSON.<|im_end|>\n<|im_start|>user\n{sample.prompt}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt")
        answer = tuned.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert sample.tuned == tokenizer.decode(answer, skip_special_tokens=True)
        with tuned.disable_adapter():
            answer = tuned.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert sample.base == tokenizer.decode(answer, skip_special_tokens=True)
        assert sample.reference in sample.prompt or json.loads(sample.reference)["city"] in sample.prompt

    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["tuned"]["metrics"] == {"exact_match": 0.0}
    shown = rendered(result)
    for word in ("base", "tuned", "validation loss", "exact match", "What is the weather like in Paris?", "next"):
        assert word in shown

    as_folder = score(run.path, quiet=True)
    as_recipe = score(plain, quiet=True)
    assert as_folder == as_recipe == result


def test_a_recipe_without_a_run_scores_its_base(plain: dict[str, Any]) -> None:
    result = score(plain, ["evaluate.metrics=[]"], quiet=True)
    assert result.tuned is None and result.path is None
    assert result.base is not None and result.base.metrics == {}
    assert result.answers == 0 and len(result.samples) == 2
    assert "tuned" not in rendered(result)


def test_weights_trained_in_full_are_scored_against_their_base(
    finished_run: Run, plain: dict[str, Any], stock_loss: Loss
) -> None:
    run = finished_run("adapter=null", "train.learning_rate=1e-4")
    result = score(f"run:{run.name}", [f"storage={plain['storage']}"], quiet=True)
    examples = heldout(result, plain["storage"])
    assert result.kind == "model"
    for side, folder in ((result.base, plain["model"]["base"]), (result.tuned, f"{run.path}/model")):
        assert side is not None
        expected = stock_loss(AutoModelForCausalLM.from_pretrained(folder), examples)
        assert side.validation_loss == pytest.approx(expected, rel=1e-5)


def test_a_folder_outside_a_run_needs_held_out_data(
    finished_run: Run, plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run()
    of_run = score(run.path, quiet=True)
    folder = Path(run.path, "adapter").rename(tmp_path / "adapter")
    with pytest.raises(UsageError, match="R705") as error:
        score(folder, quiet=True)
    assert "data.validation=FILE" in str(error.value)
    monkeypatch.chdir(tmp_path)
    here = ["scale.workers=0", "model.dtype=fp32", "evaluate.samples=0"]
    result = score(folder, [f"data.validation={plain['data']['validation']}", *here], quiet=True)
    assert result.tuned is not None and of_run.tuned is not None
    assert result.tuned.validation_loss == pytest.approx(of_run.tuned.validation_loss, rel=1e-6)


def test_own_metrics_are_computed_over_all_answers(finished_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def share_of_words(predictions, references):\n    return len(predictions) / 10\n")
    run = finished_run()
    result = score(run.path, [f"evaluate.metrics=[{file}:share_of_words, json_match]"], quiet=True)
    assert result.tuned is not None
    assert result.tuned.metrics == {"share_of_words": 0.5, "json_match": 0.0}


@pytest.mark.parametrize(
    ("override", "id"),
    [
        ("data.validation=null", "R703"),
        ("evaluate.metrics=[exact_mach]", "R701"),
        ("evaluate.metrics=[nowhere:f]", "R701"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_starts(
    plain: dict[str, Any], override: str, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.train.preparation.prepare", lambda recipe: pytest.fail("it started"))
    with pytest.raises(UsageError, match=id):
        score(plain, [override], quiet=True)


def test_progress_is_one_line_per_model_in_a_log(finished_run: Run) -> None:
    console = Console(file=io.StringIO(), width=100)
    score(finished_run().path, console=console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line for line in lines if line.startswith("evaluate:")] == [
        "evaluate: base model done, 5 answers",
        "evaluate: tuned model done, 5 answers",
    ]


def test_ray_workers_measure_what_one_process_measures(
    ray_cluster: str, finished_run: Run, plain: dict[str, Any]
) -> None:
    run = finished_run()
    alone = score(run.path, quiet=True)
    together = score(run.path, ["scale.workers=2"], quiet=True)
    for one, two in ((alone.base, together.base), (alone.tuned, together.tuned)):
        assert one is not None and two is not None
        assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-6)
        assert two.metrics == one.metrics
    assert together.samples == alone.samples
    with pytest.raises(UsageError, match="R702"):
        score(run.path, ["scale.workers=2", "evaluate.metrics=['math:fsum']"], quiet=True)
