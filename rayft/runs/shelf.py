"""The registry's own copies of adapters: folders named by their content, each there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.errors import UsageError
from rayft.runs.content import lora_hash_of_files
from rayft.runs.storage import Location, locate
from rayft.runs.tensors import read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BASE = "base.json"
_TEXT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What turns messages into tokens."""
KEPT = (WEIGHTS, CONFIG, BASE, *_TEXT)
"""All that is ever copied: no optimizer, no code, nothing that is unpickled."""
_DRAFT = ".draft-"
_FORGOTTEN = 24 * 3600.0
"""Seconds after which a draft was left by a process that was killed."""


@dataclass(frozen=True)
class Draft:
    """A copy that nobody sees yet, and what is in it."""

    folder: Path
    key: str
    """Name of the folder that it becomes: two with the same key compute the same and read messages alike."""
    hash: str
    rank: int
    size: int
    base_name: str | None
    base_hash: str | None


class Shelf:
    """A folder of copies."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing."""
        self.folder = folder

    @contextmanager
    def draft(self, source: Location) -> Iterator[Draft]:
        """A private copy of an adapter, checked and hashed; it goes when the block ends, unless it was published.

        Raises UsageError: R425 (no LoRA adapter in safetensors), R426 (damaged, or not complete).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        copy = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self.folder))
        try:
            os.chmod(copy, 0o755)
            _copy(source, copy)
            yield _examined(copy, str(source))
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def publish(self, draft: Draft) -> Path:
        """The folder with the draft's content. Only one process may do this, or `free`, at a time."""
        target = self.folder / draft.key
        if not target.is_dir():
            os.rename(draft.folder, target)
        return target

    def free(self, used: Collection[str]) -> None:
        """Delete every copy that is not among ``used``, names of folders. A copy that goes is out of sight at once."""
        for copy in self.folder.iterdir():
            if copy.is_dir() and not copy.name.startswith(".") and copy.name not in used:
                aside = copy.with_name(f"{_DRAFT}{copy.name}")
                os.rename(copy, aside)
                shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete drafts that killed processes have left."""
        for draft in self.folder.glob(f"{_DRAFT}*"):
            try:
                if time.time() - draft.stat().st_mtime > _FORGOTTEN:
                    shutil.rmtree(draft, ignore_errors=True)
            except FileNotFoundError:  # it ended just now
                continue


def _copy(source: Location, target: Path) -> None:
    try:
        there = {child.name for child in source.children()}
        if WEIGHTS not in there or CONFIG not in there:
            missing = WEIGHTS if WEIGHTS not in there else CONFIG
            hint = "`save_pretrained(folder, safe_serialization=True)` writes safetensors; nothing else is ever read"
            raise UsageError("R425", f"{source} has no {missing}", hint if missing == WEIGHTS else None)
        for name in (name for name in KEPT if name in there):
            file = source / name
            stream = file.filesystem.open_input_stream(file.path, compression=None)
            with stream as data, open(target / name, "wb") as copy:
                shutil.copyfileobj(data, copy, 1 << 20)
                copy.flush()
                if name == WEIGHTS:
                    os.fsync(copy.fileno())
    except OSError as problem:
        raise UsageError("R426", f"{source} cannot be copied: {problem}") from problem


def _examined(copy: Path, source: str) -> Draft:
    """What a copy is. Messages speak of ``source``."""
    config = _json(copy / CONFIG, source)
    if (kind := config.get("peft_type")) != "LORA":
        raise UsageError("R425", f"{source} is no LoRA adapter: its peft_type is {kind!r}")
    base = _json(copy / BASE, source) if (copy / BASE).exists() else {}
    if not isinstance(config.get("r", 8), int) or config.get("r", 8) < 1:
        raise UsageError("R426", f"{source}: {CONFIG} gives the rank {config['r']!r}")
    weights = locate(copy / WEIGHTS)
    try:
        hash = lora_hash_of_files(config, weights)
        down = (".lora_A.weight", ".lora_embedding_A")
        ranks = [tensor.shape[0] for tensor in read_header(weights) if tensor.name.endswith(down) and tensor.shape]
    except (ValueError, RecursionError) as problem:
        raise UsageError("R426", f"{source}: {WEIGHTS} is damaged: {problem}", "copy the adapter again") from problem
    return Draft(
        folder=copy,
        key=f"{hash}-{_text_hash(copy, source)[:12]}",
        hash=hash,
        rank=max(ranks, default=config.get("r", 8)),
        size=sum(file.stat().st_size for file in copy.iterdir()),
        base_name=_text(config.get("base_model_name_or_path")),
        base_hash=_text(base.get("base_hash")),
    )


def _text_hash(copy: Path, source: str) -> str:
    """sha256 of the tokenizer's and template's files: the same weights may be asked in two ways."""
    digest = hashlib.sha256()
    for name in _TEXT:
        if (copy / name).exists():
            data = (copy / name).read_bytes()
            if name == "tokenizer_config.json":  # it also says where the tokenizer once lay
                config = _json(copy / name, source)
                config.pop("name_or_path", None)
                data = json.dumps(config, sort_keys=True).encode()
            digest.update(f"{name} {len(data)} ".encode())
            digest.update(data)
    return digest.hexdigest()


def _json(file: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise UsageError("R426", f"{source}: {file.name} is not JSON: {problem}", "copy the adapter again") from problem
    if not isinstance(value, dict):
        raise UsageError("R426", f"{source}: {file.name} is no JSON object")
    return value


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
