"""Optuna Dashboard beside a sweep shows its study."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from rayft.runs.folder import RunFolder
from rayft.tune.dashboard import running
from rayft.tune.study import Study
from tests.tune.conftest import sweep


def get(url: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.loads(answer.read())
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)


def test_it_serves_the_study(tmp_path: Path) -> None:
    resolved = sweep()
    recipe = resolved.recipe.model_copy(update={"storage": str(tmp_path)})
    folder = RunFolder.create(type(resolved)(recipe, resolved.origin), "tune")
    study = Study(resolved, folder.path, budget=9)
    study.next("lane-0")
    said: list[str] = []
    assert recipe.tune is not None
    with running(recipe.tune, folder, lambda text, _: said.append(text)) as address:
        studies = get(f"{address}/api/studies")
    assert [found["study_name"] for found in studies["study_summaries"]] == ["sweep"]
    assert address in said[0]
