"""A recipe as plain data: YAML 1.2 with its line numbers, overrides on top. Nothing is checked here but the syntax."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from rayft.config.data import as_sources
from rayft.errors import UsageError


@dataclass
class Document:
    """Plain data and, for each dotted path in it, where it was written (`recipe.yaml line 7`)."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Document:
        """The recipe in a file, or in the run folder of that name.

        Raises UsageError R101 (no such file), R102 (not YAML, or not a mapping).
        """
        file = path / "recipe.yaml" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("R101", f"cannot read the recipe {file}: {_reason(error)}", _similar_file(file)) from None
        return cls.parse(text, file.name)

    @classmethod
    def parse(cls, text: str, name: str = "recipe") -> Document:
        """Raises UsageError R102 when the text is not one YAML mapping without duplicate keys."""
        tree = parse_yaml(text, name)
        if tree is None:
            return cls()
        if not isinstance(tree, dict):
            raise UsageError("R102", f"{name} holds {_kind(tree)}; a recipe is a mapping: `model: {{base: ...}}`")
        places: dict[str, str] = {}
        return cls(_plain(tree, name, "", places), places)

    def override(self, text: str) -> None:
        """Put `a.b=value` on top. The value is YAML 1.2; sections on the way appear when they are absent or null.

        Raises UsageError R103 when there is no `=`, the value is not YAML, or the path leads through a plain value.
        """
        path, equals, value = text.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise UsageError("R103", f"override {text!r} is not key=value", "for example train.learning_rate=1e-4")
        parsed = _plain(parse_yaml(value, f"the value of override {path!r}", id="R103"), "override", path.strip(), {})
        if parts[0] == "data" and parts[2:3] and parts[2].isdigit():
            self._list_sources(parts[1])
        node: Any = self.data
        for depth, part in enumerate(parts):
            here = ".".join(parts[:depth])
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    raise UsageError("R103", f"override {text!r}: {here} has {len(node)} items and no {part!r}")
            elif not isinstance(node, dict):
                raise UsageError("R103", f"override {text!r}: {here} is {_kind(node)} and has no keys below it")
            step: Any = int(part) if isinstance(node, list) else part
            if depth == len(parts) - 1:
                node[step] = parsed
            else:
                if isinstance(node, dict) and node.get(step) is None:
                    node[step] = {}
                node = node[step]
        self.places[path.strip()] = "override"

    def place(self, path: str) -> str | None:
        """Where a key was written; the closest section above it when the key itself was not."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path)

    def _list_sources(self, name: str) -> None:
        """`data.train.0.limit=5` also works where the file holds the short form `train: file.jsonl`."""
        data = self.data.get("data")
        if isinstance(data, dict) and isinstance(data.get(name), str | dict):
            data[name] = as_sources(data[name])


class _Constructor(RoundTripConstructor):
    """YAML 1.2's core schema has no timestamps: `2026-11-22` stays text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda constructor, node: node.value)


def parse_yaml(text: str, name: str, id: str = "R102") -> Any:
    """YAML 1.2 as ruamel's round-trip tree, which remembers lines. Raises UsageError (R102, or the given id)."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(io.StringIO(text))
    except DuplicateKeyError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = str(error.problem).split(" with value")[0].replace("found ", "")
        raise UsageError(id, f"{name}{line}: {problem}", "a key may stand once in its section") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        problem = error.problem if isinstance(error, MarkedYAMLError) else str(error)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark and "\n" in text.strip() else ""
        hint = "text that holds `: `, `{`, `[`, `*` or `#` needs quotes"
        raise UsageError(id, f"{name}{line} is not valid YAML: {problem or error}", hint) from None


def plain(value: Any) -> Any:
    """Mappings, sequences and paths from Python callers as plain dict, list and str."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, Path):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, Sequence) else value


def _plain(node: Any, name: str, path: str, places: dict[str, str]) -> Any:
    """ruamel's tree as plain dict, list, str, int, float, bool, None; `places` collects the lines."""
    if isinstance(node, CommentedMap):
        result = {}
        for key, item in node.items():
            below = f"{path}.{key}" if path else str(key)
            if key in node.lc.data:
                places[below] = f"{name} line {node.lc.key(key)[0] + 1}"
            result[str(key)] = _plain(item, name, below, places)
        return result
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[f"{path}.{index}"] = f"{name} line {node.lc.item(index)[0] + 1}"
        return [_plain(item, name, f"{path}.{index}", places) for index, item in enumerate(node)]
    if node is None or isinstance(node, bool):
        return node
    if isinstance(node, ScalarBoolean):  # an anchored true or false, which is an int otherwise
        return bool(node)
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    raise UsageError("R102", f"{name}: {path} carries a YAML tag; recipes hold plain values only")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else f"the value {value!r}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or "unreadable").lower()
    return "not UTF-8 text"


def _similar_file(file: Path) -> str | None:
    """The YAML file nearby that was probably meant."""
    folder = file.parent
    names = sorted(item.name for item in folder.glob("*.y*ml")) if folder.is_dir() else []
    near = difflib.get_close_matches(file.name, names, n=1) or names[:3]
    if "=" in file.name:
        return "an override is written key=value without a recipe before it"
    return f"did you mean {', '.join(str(folder / name) for name in near)}?" if near else None
