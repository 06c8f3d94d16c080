"""How each adapter is talked to: the tokenizers and chat templates that they bring along."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayft.models.save import saved_tokenizer
from rayft.serve.render import Renderer

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_KEPT = 16


class Voices:
    """Adapters whose files are alike share one tokenizer: a hundred runs on one base have one or two. Thread-safe."""

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        self.base = Renderer(base)
        self._by_folder: dict[str, str] = {}
        self._by_content: OrderedDict[str, Renderer] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: str | None) -> Renderer:
        """With the tokenizer and chat template in an adapter's folder; the base's where it has none, and for None."""
        if folder is None or not Path(folder, "tokenizer_config.json").is_file():
            return self.base
        with self._lock:
            if folder not in self._by_folder:
                self._by_folder[folder] = _fingerprint(Path(folder))
            content = self._by_folder[folder]
            if content not in self._by_content:
                self._by_content[content] = Renderer(saved_tokenizer(folder))
                if len(self._by_content) > _KEPT:
                    self._by_content.popitem(last=False)
            self._by_content.move_to_end(content)
            return self._by_content[content]


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _FILES:
        file = folder / name
        if file.is_file():
            data = file.read_bytes()
            if name == "tokenizer_config.json":
                config = json.loads(data)
                config.pop("name_or_path", None)
                data = json.dumps(config, sort_keys=True).encode()
            digest.update(name.encode() + data)
    return digest.hexdigest()
