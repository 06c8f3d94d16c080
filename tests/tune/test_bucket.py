"""A sweep whose storage is a bucket: the study is a database elsewhere, everything else is read from the bucket."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import UsageError
from rayft.runs.reference import resolve
from rayft.runs.storage import locate
from rayft.tune import search
from tests.train.conftest import Recipes
from tests.tune.test_search import sweep


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAYFT_HOME", str(tmp_path / "home"))
    return str(s3.uri(f"bucket/{uuid.uuid4().hex}"))


def test_a_sweep_leaves_everything_in_the_bucket(recipe: Recipes, bucket: str, tmp_path: Path) -> None:
    local = search(sweep(recipe, scheduler="none"), quiet=True)
    plain = sweep(recipe, {"storage": bucket}, scheduler="none", study_storage=f"sqlite:///{tmp_path}/study.db")
    result = search(plain, quiet=True)
    assert result.path.startswith("s3://")
    assert [row.values for row in result.rows] == [row.values for row in local.rows]
    losses = [[row.metrics["validation_loss"] for row in rows] for rows in (result.rows, local.rows)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6), "packs grow at other moments"
    run = locate(bucket) / "sweep"
    assert all((run / name).is_file() for name in ("report.md", "best.yaml", "metrics.jsonl", "trials.json"))
    found = resolve(f"run:sweep@trial-{result.best}", bucket)
    assert found.content_hash == resolve("run:sweep", bucket).content_hash
    assert len(result.result_grid) == 4
    best = result.result_grid.get_best_result().metrics
    assert best is not None and best["validation_loss"] == result.metrics["validation_loss"]
    assert search(plain, mode="resume", quiet=True).rows == result.rows


def test_a_journal_wants_a_file_system(recipe: Recipes, bucket: str) -> None:
    with pytest.raises(UsageError, match="study_storage") as refused:
        search(sweep(recipe, {"storage": bucket}), quiet=True)
    assert refused.value.id == "R734"
    assert not (locate(bucket) / "sweep").exists(), "refused before anything is begun"
