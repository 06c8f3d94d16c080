"""Metrics by hand-counted answers, and against scikit-learn's accuracy where it is installed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rayft import metrics
from rayft.errors import UsageError
from rayft.metrics import registry


def test_exact_match_compares_stripped_strings() -> None:
    assert metrics.exact_match(["a", " b\n", "c c", "D"], ["a", "b", "c  c", "d"]) == 0.5
    assert metrics.exact_match_whitespace(["a", " b\n", "c c", "D"], ["a", "b", "c \t c", "d"]) == 0.75
    assert math.isnan(metrics.exact_match([], []))
    with pytest.raises(ValueError):
        metrics.exact_match(["a"], ["a", "b"])


def test_exact_match_is_accuracy() -> None:
    score = pytest.importorskip("sklearn.metrics").accuracy_score
    predictions, references = list("abcabcabca"), list("abccbaabcb")
    assert metrics.exact_match(predictions, references) == score(references, predictions)


def test_json_match_compares_values() -> None:
    reference = '{"name": "f", "arguments": {"a": 1, "b": [1, "x"]}}'
    same = '{"arguments":{"b":[1,"x"],"a":1},\n "name":"f"}'
    others = [
        '{"name": "f", "arguments": {"a": "1", "b": [1, "x"]}}',  # a string is no number
        '{"name": "f", "arguments": {"a": 1, "b": ["x", 1]}}',  # the order of a list counts
        f"{reference} thanks",
        "no JSON",
        "",
        "[" * 100_000,
    ]
    assert metrics.json_match([reference, same], [reference] * 2) == 1.0
    assert metrics.json_match(others, [reference] * len(others)) == 0.0
    assert metrics.json_match(['{"a": NaN}'], ['{"a": 1}']) == 0.0
    with pytest.raises(ValueError):
        metrics.json_match(["1"], ["no JSON"])


def test_perplexity_is_the_exponential() -> None:
    assert metrics.perplexity(2.5) == pytest.approx(torch.tensor(2.5, dtype=torch.float64).exp().item())
    assert metrics.perplexity(math.log(49152)) == pytest.approx(49152)
    assert metrics.perplexity(1e9) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))


def test_own_metric_from_a_file_and_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine_for_rayft.py"
    file.write_text("def shorter(predictions, references):\n    return min(map(len, predictions))\n")
    assert registry.compute([f"{file}:shorter", "exact_match"], ["ab", "c"], ["ab", "d"]) == {
        "shorter": 1.0,
        "exact_match": 0.5,
    }
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.compute(["mine_for_rayft:shorter"], ["abc"], ["x"]) == {"shorter": 3.0}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exact_mach", "did you mean exact_match?"),
        ("bleurgh", "package.module:function"),
        ("no_such_module_here:f", "no_such_module_here"),
        ("math:no_such_function", "no_such_function"),
        ("/nowhere/file.py:f", "/nowhere/file.py"),
    ],
)
def test_unknown_metrics_are_named(name: str, said: str) -> None:
    with pytest.raises(UsageError, match="R701") as error:
        metrics.named(name)
    assert said in str(error.value)


def test_a_failing_metric_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def fails(p, r):\n    raise KeyError('x')\ndef text(p, r):\n    return 'much'\n")
    for function in ("fails", "text"):
        with pytest.raises(UsageError, match="R702") as error:
            metrics.compute([f"{file}:{function}"], ["a"], ["a"])
        assert function in error.value.message
