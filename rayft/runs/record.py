"""``run.json``: what a run is, how it stands, and what it was made from."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["running", "finished", "failed", "stopped"]
SCHEMA = 1
_PACKAGES = ("rayft", "torch", "transformers", "peft", "ray", "deepspeed", "bitsandbytes")


class RunRecord(BaseModel):
    """The content of ``run.json``. Times are UTC, ISO 8601."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema")
    name: str
    verb: str
    state: State = "running"
    created: str = Field(default_factory=lambda: now())
    resumed: list[str] = []
    """When the run was taken up again."""
    ended: str | None = None
    parent: str | None = None
    """The run this one starts from: `run:NAME` or a path."""
    replaces: list[str] = []
    """Folders that `--overwrite` has set aside; they are deleted after this run's first checkpoint."""
    hashes: dict[str, str] = {}
    """Of base, data and template: what must be the same when the run is resumed."""
    versions: dict[str, str] = Field(default_factory=lambda: versions())
    facts: dict[str, Any] = {}
    """Results worth finding again, such as `best_step`."""

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers, without importing any of it."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
