"""``$RAYFT_HOME`` (default ``~/.cache/rayft``): what a machine keeps from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    return Path(os.environ.get("RAYFT_HOME") or "~/.cache/rayft").expanduser()
