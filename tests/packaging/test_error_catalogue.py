"""Every error id has one section in docs/errors, and every section an id that the code still raises."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ids_and_pages_agree() -> None:
    raised = {id for file in (ROOT / "rayft").rglob("*.py") for id in re.findall(r'"(R\d{3})"', file.read_text())}
    pages = [
        id
        for file in (ROOT / "docs/errors").glob("*.md")
        for id in re.findall(r"^## (R\d{3}) ", file.read_text(), re.M)
    ]
    assert len(pages) == len(set(pages)), "an id has two sections"
    assert set(pages) == raised
