from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.config import Resolved, load


@pytest.fixture(params=["folder", "bucket", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage on the file system, then two that are buckets: through fsspec and through pyarrow's own client."""
    monkeypatch.setenv("RAYFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAYFT_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    if request.param == "s3":
        return str(request.getfixturevalue("s3").uri(f"bucket/{uuid.uuid4().hex}"))
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def resolved(storage: str, tmp_path: Path) -> Callable[..., Resolved]:
    """``resolved("key=value", ...)``: a small valid recipe named ``demo`` in the storage."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    plain: dict[str, Any] = {
        "name": "demo",
        "storage": storage,
        "model": {"base": str(tmp_path)},
        "adapter": {"rank": 4},
        "data": {"train": str(tmp_path / "rows.jsonl")},
    }
    return lambda *overrides: load(plain, overrides)
