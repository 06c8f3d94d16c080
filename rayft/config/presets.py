"""Published settings of federated fine-tuning by name, as values of the section ``federate``."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "flowertune-general": {"clients": 20, "cohort": {"size": 0.1}},
    "flowertune-finance": {"clients": 50, "cohort": {"size": 0.1}},
    "flowertune-medical": {"clients": 20, "cohort": {"size": 0.1}},
    "flowertune-code": {"clients": 10, "cohort": {"size": 0.2}},
    "openfedllm": {"clients": 20, "cohort": {"size": 2}},
}
"""What is a setting's own. FlowerTune: arXiv 2506.02961 and its four baselines. OpenFedLLM: arXiv 2402.06954."""

_SHARED: dict[str, Any] = {
    "rounds": 200,
    "local_steps": 10,
    "partition": {"method": "iid"},
    "strategy": "fedavg",
    "aggregation": "fedit",
    "lr_schedule": "cosine",
    "min_learning_rate": 1e-6,
}
_FLOWERTUNE: dict[str, Any] = {"communication_budget_mb": 200_000.0}

TRAINING: dict[str, Any] = {
    "adapter": {"rank": 32, "alpha": 64},
    "train": {"learning_rate": 5e-5, "global_batch_size": 16},
}
"""What both publish for the other sections of a recipe; a preset of `federate` does not touch them."""


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The section with the preset's values where the user gave none, one level deep."""
    name = given["preset"]
    values = _SHARED | (_FLOWERTUNE if name.startswith("flowertune") else {}) | PRESETS[name]
    merged = dict(given)
    for key, value in values.items():
        if key == "local_steps" and given.get("local_epochs") is not None:
            continue
        if isinstance(value, dict) and isinstance(given.get(key, {}), dict):
            merged[key] = value | given.get(key, {})
        else:
            merged.setdefault(key, value)
    return merged
