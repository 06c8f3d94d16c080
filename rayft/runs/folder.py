"""The run folder ``<storage>/<name>/``: one run of one verb, and the only writer of its top level."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from filelock import FileLock
from ruamel.yaml import YAML

from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved
from rayft.errors import RayftError, RunStopped, UsageError
from rayft.home import home
from rayft.runs import checkpoints
from rayft.runs.changes import Change, changes
from rayft.runs.checkpoints import CHECKPOINTS
from rayft.runs.lines import Lines, read_lines
from rayft.runs.metrics import MetricsLog, Row
from rayft.runs.record import SCHEMA, RunRecord, State, now
from rayft.runs.storage import Location, check_writable, is_committed, locate, lock, staged, write_atomic

Mode = Literal["fail", "resume", "overwrite", "new"]
TRASH = ".trash-"
LOCK = ".lock"

logger = logging.getLogger(__name__)


class RunFolder:
    """A run on its storage. `create` makes or takes one up for writing, `open` looks at one.

    As a context manager it marks the run failed (or stopped) when the block ends with an error while it is running.
    """

    def __init__(self, location: Location, record: RunRecord, held: FileLock | None = None) -> None:
        self.location = location
        self.record = record
        self.changes: list[Change] = []
        """What `--resume` changed in the recipe."""
        self._lock = held
        self._metrics: MetricsLog | None = None

    # Making and finding

    @classmethod
    def create(
        cls, resolved: Resolved, verb: str, mode: Mode = "fail", *, name: str | None = None, parent: str | None = None
    ) -> RunFolder:
        """Make the run's folder, or take it up again; the recipe is written into it, its state is ``running``.

        ``name`` is the recipe's by default. Modes: ``fail`` when the name is in use; ``resume`` goes on with the run
        that has it (a finished run stays finished; without one the run begins); ``overwrite`` sets that run aside
        until this one's first checkpoint; ``new`` appends -2, -3, ...

        Raises UsageError: R401 storage cannot be written, R402 name in use, R403 the folder is no run, R404 the
        resumed run would compute something else, R406 another process works on it.
        """
        storage = locate(resolved.recipe.storage)
        name = name or resolved.recipe.name
        check_writable(storage)
        if mode == "new":
            name = _free_name(storage, name)
        location = storage / name
        if not location.exists():
            if mode == "resume":
                logger.warning("there is no run %r in %s yet: it begins", name, storage)
            return cls._begin(location, resolved, RunRecord(name=name, verb=verb, parent=parent))
        former = cls.open(location)
        if mode == "resume":
            return former._take_up(resolved, verb)
        if mode == "overwrite":
            aside = [former.set_aside(), *former.record.replaces]
            record = RunRecord(name=name, verb=verb, parent=parent, replaces=aside)
            return cls._begin(location, resolved, record)
        raise UsageError(
            "R402",
            f"the run name {name!r} is in use in {storage} ({former.record.verb}, {former.state})",
            "--resume goes on with it, --overwrite replaces it, --new takes a free name; or set name=...",
        )

    @classmethod
    def taken_up(cls, resolved: Resolved, verb: str, mode: Mode) -> RunFolder | None:
        """The run's folder where it exists already and is wanted, else None. A name in use fails here, as in `create`,
        before a cluster is started."""
        exists = (locate(resolved.recipe.storage) / resolved.recipe.name).exists()
        if mode == "resume" or (mode == "fail" and exists):
            return cls.create(resolved, verb, mode)
        return None

    @classmethod
    def _begin(cls, location: Location, resolved: Resolved, record: RunRecord) -> RunFolder:
        """Fill a fresh folder. Locally it appears whole, by one rename that only one of two processes can win."""
        if not location.is_local:
            write_atomic(location / "recipe.yaml", resolved.to_yaml())
            write_atomic(location / "run.json", record.to_json())
            return cls(location, record)
        staging = Path(tempfile.mkdtemp(prefix=f".{location.name}.", dir=location.local.parent))
        os.chmod(staging, 0o755)
        write_atomic(staging / "recipe.yaml", resolved.to_yaml())
        write_atomic(staging / "run.json", record.to_json())
        try:
            os.rename(staging, location.local)
        except OSError as problem:
            shutil.rmtree(staging)
            raise UsageError(
                "R402", f"the run name {record.name!r} was taken by another process just now", "--new takes a free one"
            ) from problem
        return cls(location, record, lock(location / LOCK))

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Location) -> RunFolder:
        """Look at a run without touching it. Raises UsageError R403 (no run.json) or R416 (not readable)."""
        location = locate(place)
        file = location / "run.json"
        if not file.is_file():
            raise UsageError(
                "R403", f"{location} is not a run: it holds no run.json", "rayft touches only folders it made itself"
            )
        try:
            record = RunRecord.model_validate_json(file.read())
        except ValueError as problem:
            raise UsageError("R416", f"{file} cannot be read: {problem}", "was it edited?") from problem
        if record.schema_version > SCHEMA:
            raise UsageError("R416", f"{file} was written by a newer rayft ({record.versions.get('rayft')})", "upgrade")
        return cls(location, record)

    def _take_up(self, resolved: Resolved, verb: str) -> RunFolder:
        if self.record.verb != verb:
            raise UsageError("R404", f"run {self.name!r} is a {self.record.verb} run, not {verb}", "use another name")
        self.changes = [change for change in changes(self.recipe(), resolved.recipe) if change.key != "name"]
        if frozen := [change for change in self.changes if not change.free]:
            listed = "\n  ".join(map(str, frozen))
            raise UsageError(
                "R404",
                f"run {self.name!r} cannot be resumed with another computation; these keys differ:\n  {listed}",
                "take the values back, or start another run with --new",
            )
        for change in self.changes:
            logger.warning("resumed with a changed recipe: %s", change)
        if self.location.is_local:
            self._lock = lock(self.location / LOCK)
        if self.state != "finished":
            self.record.state, self.record.ended = "running", None
            self.record.resumed.append(now())
            write_atomic(self.location / "recipe.yaml", resolved.to_yaml())
            self._save()
        return self

    # What it is

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def path(self) -> str:
        """Absolute path, or URI in a bucket."""
        return str(self.location)

    @property
    def state(self) -> State:
        return self.record.state

    @property
    def scratch(self) -> Path:
        """A folder on this machine for the run's working files: the run itself, or a stand-in for one in a bucket."""
        if self.location.is_local:
            return self.location.local
        folder = home() / "runs" / hashlib.sha256(self.path.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def recipe(self) -> Recipe:
        """The recipe that is stored in the run."""
        data = YAML(typ="safe", pure=True).load((self.location / "recipe.yaml").read().decode())
        return Recipe.model_validate(data)

    def is_alive(self) -> bool:
        """Whether a process works on this run now. A running one that is not alive was killed. Buckets: as recorded."""
        if self.state != "running" or not self.location.is_local:
            return self.state == "running"
        try:
            lock(self.location / LOCK).release()
        except (UsageError, OSError):  # held, or a storage that may only be read
            return True
        return False

    # Files of the top level

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.location / name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run, or None when there is none."""
        file = self.location / name
        return json.loads(file.read()) if file.is_file() else None

    def write_file(self, name: str, data: bytes | str) -> None:
        write_atomic(self.location / name, data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local folder that becomes ``<run>/<name>``, complete or not at all.

        ``name`` is ``adapter``, ``model`` or the like of ``trials/3/adapter``.
        """
        target = self.location
        for part in name.split("/")[:-1]:
            target = target / part
            target.make_folder()
        with staged(target / name.rsplit("/", 1)[-1]) as folder:
            yield folder

    def result(self) -> Location | None:
        """The finished ``adapter/`` or ``model/``, if there is one."""
        for name in ("adapter", "model"):
            if is_committed(self.location / name):
                return self.location / name
        return None

    # Metrics and events: written by one process of a run

    def metrics_log(self) -> MetricsLog:
        """``metrics.jsonl`` for the process that writes it."""
        if self._metrics is None:
            self._metrics = MetricsLog(self.location / "metrics.jsonl", self.scratch)
        return self._metrics

    def events_log(self) -> Lines:
        """``events.jsonl`` for the process that writes it."""
        return Lines(self.location / "events.jsonl", self.scratch)

    def append_metrics(self, row: Row) -> None:
        """Add scalars of a step; see `MetricsLog.append`."""
        self.metrics_log().append(row)

    def metrics(self) -> list[Row]:
        """The rows, by step."""
        return self._metrics.rows() if self._metrics else read_lines(self.location / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order: `kind`, `time` (Unix seconds), then facts."""
        return read_lines(self.location / "events.jsonl")

    # Checkpoints

    def checkpoints(self) -> dict[int, str]:
        """Step -> folder of every complete checkpoint, in the order of steps; of two of one step the later one."""
        return {step: str(folder) for step, folder in checkpoints.complete(self.location)}

    def adopt(self, checkpoint: str) -> None:
        """Copy a checkpoint of another run in: this one goes on from there."""
        source = locate(checkpoint)
        target = self.location / CHECKPOINTS
        target.make_folder()
        source.copy_to(target / source.name)
        self.index_checkpoints()

    def index_checkpoints(self) -> dict[int, str]:
        """Write ``checkpoints/steps.json`` (step -> folder name) anew. A run set aside is deleted at the first one."""
        found = self.checkpoints()
        names = {str(step): locate(path).name for step, path in found.items()}
        self.write_json(f"{CHECKPOINTS}/steps.json", names)
        if found:
            self._delete_replaced()
        return found

    # State

    def pin(self, **hashes: str) -> None:
        """Record what the run is made from (``base``, ``data``, ``template``) or, when it is recorded, insist on it.

        Raises UsageError R407 when a resumed run would meet something else under the same name.
        """
        for key, value in hashes.items():
            if self.record.hashes.setdefault(key, value) != value:
                raise UsageError(
                    "R407",
                    f"the {key} of run {self.name!r} has changed since it began ({self.record.hashes[key][:12]} "
                    f"then, {value[:12]} now)",
                    "bring the old one back, or start another run with --new",
                )
        self._save()

    def note(self, **facts: Any) -> None:
        """Record results in run.json, such as ``best_step``."""
        self.record.facts |= facts
        self._save()

    def finish(self, state: Literal["finished", "failed", "stopped"], **facts: Any) -> None:
        """End the run: the state and facts are written, metrics uploaded, the lock given back."""
        if self._metrics:
            self._metrics.flush()
        self.record.state, self.record.ended = state, now()
        self.note(**facts)
        if state == "finished":
            self._delete_replaced()
        self.release()

    def release(self) -> None:
        """Let other processes take the run up, whatever its state."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def set_aside(self) -> str:
        """Rename the run to a free ``.trash-`` name in its storage and return its new path.

        Raises UsageError R406 when a process works on it.
        """
        storage = self.location.parent
        trash = storage / _free_name(storage, f"{TRASH}{self.location.name}")
        held = lock(self.location / LOCK) if self.location.is_local else None
        self.location.move_to(trash)
        if held:
            held.release()
        return str(trash)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.state == "running":
            stopped = isinstance(error, RunStopped | KeyboardInterrupt)
            reason = str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
            self.finish("stopped" if stopped else "failed", error=reason)
        self.release()

    def _save(self) -> None:
        write_atomic(self.location / "run.json", self.record.to_json())

    def _delete_replaced(self) -> None:
        for place in self.record.replaces:  # run.json keeps the names: others may be writing it at this moment
            locate(place).remove()


def _free_name(storage: Location, name: str) -> str:
    number, candidate = 1, name
    while (storage / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate
