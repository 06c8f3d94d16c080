"""The Optuna study of a sweep: where it is kept, which sampler proposes, and that one process works on it at a time."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from rayft.config.tune import Tune
from rayft.errors import UsageError

JOURNAL = "study.journal"
_REPEATABLE = ("qmc", "grid")
"""Samplers that find their place in the storage; the others would draw the same numbers again after a resume."""


def open_study(tune: Tune, name: str, folder: Path, seed: int, *, resume: bool) -> optuna.Study:
    """The sweep's study, new or continued. The caller holds the lock on `folder`.

    Raises UsageError: R730 the journal or database cannot be read, R731 the name is in use there.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    place = tune.study_storage or str(folder / JOURNAL)
    try:
        storage = _url(place) if tune.study_storage else _journal(folder / JOURNAL)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize" if mode == "min" else "maximize" for _, mode in tune.objectives],
            pruner=optuna.pruners.NopPruner(),  # Ray's schedulers decide
            load_if_exists=resume,
        )
        known = len(study.get_trials(deepcopy=False))
    except optuna.exceptions.DuplicatedStudyError:
        raise UsageError(
            "R731", f"there is a study {name!r} in {place} already", "--resume goes on with it, or set another name=..."
        ) from None
    except Exception as error:  # Optuna and SQLAlchemy raise what they stumble over: KeyError, ValueError, DBAPIError
        raise UsageError(
            "R730",
            f"the study in {place} cannot be read: {type(error).__name__}: {error}",
            "bring a backup of it back, or begin the sweep anew with --overwrite",
        ) from error
    study.sampler = sampler(tune, seed if tune.search_alg in _REPEATABLE else seed + known)
    return study


def sampler(tune: Tune, seed: int) -> optuna.samplers.BaseSampler:
    """Raises UsageError R733 where the sampler's package is missing."""
    match tune.search_alg:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        case "qmc":
            return optuna.samplers.QMCSampler(scramble=True, seed=seed)
        case "cmaes":
            if find_spec("cmaes") is None:
                raise UsageError("R733", "tune.search_alg: cmaes needs the package cmaes", "pip install cmaes")
            return optuna.samplers.CmaEsSampler(seed=seed)
        case _:  # the points of a grid are queued, so that conditions and invalid points can be left out
            return optuna.samplers.RandomSampler(seed=seed)


def _url(url: str) -> Any:
    if url.endswith(".journal"):
        return _journal(Path(url))
    return optuna.storages.get_storage(url)


def _journal(path: Path) -> optuna.storages.JournalStorage:
    """The journal file, without what a killed process left behind: its lock, and the torn end of its last line."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        with path.open("r+b") as file:
            data = file.read()
            if data and not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
                os.fsync(file.fileno())
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
