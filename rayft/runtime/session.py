"""The Ray session: the only place that starts or finds a cluster."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.runtime import auth

_OBJECT_STORE = 512 * 2**20
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # keeps a warning about a coming default out of every log
    "RAY_DEDUP_LOGS": "1",
}

logger = logging.getLogger(__name__)


def connect(recipe: Recipe | None = None) -> str:
    """Connect this process to Ray and return the address (``local`` for a cluster started just now).

    In this order: the session that exists already, $RAY_ADDRESS, the cluster that `ray start` left on this machine,
    a new one of this machine alone that ends with the process. Usage statistics are off. `scale.env` names variables
    that every task and actor of the run gets; one that is not set here is R510.

    Raises UsageError: R501 nobody answers at the address, R502 the cluster refuses our token, R509 the address is not
    one of a head node, R510.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if recipe:
        environment(recipe)
    import ray
    import torch  # noqa: F401

    # torch is imported here, in the main thread and before Ray has threads: first imported in a side thread, with one
    # OpenMP thread, MKL's loader ended the process now and then ("Cannot load libtorch_cpu.so").
    if ray.is_initialized():
        return str(ray.get_runtime_context().gcs_address)
    address = existing()
    if address is None:
        _start_here()
        return "local"
    if "://" in address:
        raise UsageError(
            "R509",
            f"RAY_ADDRESS is {address!r}; training needs the head's own host:port and must run inside the cluster",
            "run `rayft submit RECIPE --address http://HEAD:8265` from outside, or unset RAY_ADDRESS to start Ray here",
        )
    if address != "auto":
        auth.settle(address)
    variables = {**inherited(), **(environment(recipe) if recipe else {})}
    # In a job they are the job's already, and Ray refuses to be told twice.
    runtime_env = {"env_vars": variables} if variables and not in_job() else None
    ray.init(address, runtime_env=runtime_env, **_speech())
    return address


def environment(recipe: Recipe) -> dict[str, str]:
    """The variables that `scale.env` names, by value from this process. Raises UsageError R510 for one not set."""
    missing = [name for name in recipe.scale.env if name not in os.environ]
    if missing:
        raise UsageError(
            "R510",
            f"scale.env names {', '.join(missing)}, which is not set here",
            "export it, or take it out of scale.env",
        )
    return {name: os.environ[name] for name in recipe.scale.env}


def inherited() -> dict[str, str]:
    """Variables of this process that say where models, data and working files lie, and whether there is a network."""
    names = ("RAYFT_HOME", "HF_HUB_OFFLINE", "HF_HOME")
    return {name: os.environ[name] for name in names if name in os.environ}


def in_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def existing() -> str | None:
    """The cluster that `connect` would join: $RAY_ADDRESS, or the one that `ray start` left on this machine."""
    return os.environ.get("RAY_ADDRESS") or _running_here()


def _running_here() -> str | None:
    """Address of the cluster that `ray start` left on this machine, if it still answers."""
    folder = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    file = Path(folder) / "ray" / "ray_current_cluster"
    address = file.read_text().strip() if file.is_file() else ""
    return address if address and auth.listens(address) else None


def _start_here() -> None:
    import ray

    logger.info("starting Ray on this machine")
    if auth.MODE not in os.environ:
        auth.turn_on()  # as Ray would, which announces it with a warning
    ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **_speech())


def _speech() -> dict[str, Any]:
    """What Ray prints here: errors. What workers print stays in Ray's log folder, unless rayft's logger is on DEBUG."""
    return {"logging_level": logging.ERROR, "log_to_driver": logger.isEnabledFor(logging.DEBUG)}
