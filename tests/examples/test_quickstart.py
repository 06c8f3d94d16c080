"""The quickstart's recipe on the real model: what a user of `make quickstart` is promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.evaluate import score
from rayft.train import fit

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "quickstart.yaml"
WORKERS = "scale.workers=2"
"""The session's cluster has more logical than real cores; two workers are what `make quickstart` gets on two cores."""

pytestmark = pytest.mark.smollm2


@pytest.mark.timeout(1200)
def test_a_third_of_it_beats_the_base(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPE.parents[2])
    fewer = ["train.max_steps=27", "evaluate.limit=16"]
    result = fit(RECIPE, [f"storage={tmp_path}", WORKERS, *fewer, "evaluate.metrics=[]", "evaluate.samples=0"])
    measured = score(result.path, [WORKERS, "evaluate.metrics=[exact_match]", *fewer[1:]])
    assert measured.base is not None and measured.tuned is not None
    assert measured.base.metrics["exact_match"] <= 0.05
    assert measured.tuned.metrics["exact_match"] >= 0.2
    assert measured.tuned.validation_loss < 0.1 * measured.base.validation_loss


@pytest.mark.slow
def test_the_quickstart_keeps_its_promise(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPE.parents[2])
    result = fit(RECIPE, [f"storage={tmp_path}", WORKERS])
    measured = score(result.path, [WORKERS])
    assert measured.base is not None and measured.tuned is not None
    assert measured.base.metrics["exact_match"] <= 0.05
    assert measured.tuned.metrics["exact_match"] >= 0.9
    assert measured.answers == 100
