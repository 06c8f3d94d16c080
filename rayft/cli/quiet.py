"""One place that keeps other libraries quiet. Call it before any of them is imported; the user's own settings win."""

from __future__ import annotations

import logging
import os

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

TALKATIVE = ("DeepSpeed", "bitsandbytes.backends.cpu.ops")
"""Loggers that warn, at import, about an accelerator or a kernel that is simply not there."""


def quiet() -> None:
    """No telemetry, no usage report, no progress bars but ours, no warnings about absent hardware."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(_errors_only)  # DeepSpeed sets its own level later; a filter stays


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
