"""``registry.json`` as text: one JSON object, with one alias a line, so that a change costs as much as what changed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from rayft.runs.versions import Alias

SCHEMA = 1
_HEAD = b'{"schema": 1, "edition": "'
_TAIL = b"}}"
_ALIAS = TypeAdapter(Alias)


class Book:
    """Reads and writes the text; remembers the lines it saw last, in dictionaries that are replaced as a whole: threads
    do not disturb each other."""

    def __init__(self, copies: Path) -> None:
        """copies: the folder that holds the versions' copies; the text has only their names."""
        self._copies = copies
        self._aliases: dict[bytes, Alias] = {}
        self._lines: dict[str, tuple[Alias, bytes]] = {}

    def read(self, data: bytes) -> Mapping[str, Alias]:
        """Raises ValueError, saying what is wrong with the text."""
        seen = self._aliases
        try:
            aliases = {line: seen.get(line) or self._alias(line) for line in self._split(data)}
        except (KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise ValueError(f"it is no registry ({type(problem).__name__}: {problem})") from problem
        self._aliases = aliases
        self._lines = {alias.name: (alias, line) for line, alias in aliases.items()}
        return {alias.name: alias for alias in aliases.values()}

    def write(self, aliases: Mapping[str, Alias]) -> bytes:
        # Two writings within one tick of the clock may leave files of one size and time: `edition` tells them apart.
        head = _HEAD + secrets.token_hex(8).encode() + b'", "aliases": {\n'
        return head + b",\n".join(self._line(alias) for alias in aliases.values()) + b"\n" + _TAIL + b"\n"

    def _line(self, alias: Alias) -> bytes:
        former, line = self._lines.get(alias.name, (None, b""))
        if former is alias:
            return line
        bare = replace(alias, versions=tuple(replace(v, path=Path(v.path).name) for v in alias.versions))
        return json.dumps(alias.name).encode() + b": " + _ALIAS.dump_json(bare)

    def _alias(self, line: bytes) -> Alias:
        [(name, plain)] = json.loads(b"{" + line + b"}").items()
        alias = _ALIAS.validate_python(plain)
        if alias.name != name:
            raise ValueError(f"the name of {name!r} is {alias.name!r}")
        return replace(
            alias, versions=tuple(replace(v, path=str(self._copies / Path(v.path).name)) for v in alias.versions)
        )

    def _split(self, data: bytes) -> list[bytes]:
        """One line of each alias, without the comma; of a file that somebody laid out otherwise, too."""
        lines = data.split(b"\n")
        if len(lines) > 3 and lines[0].startswith(_HEAD) and lines[-2:] == [_TAIL, b""]:
            inner, last = lines[1:-3], lines[-3]
            if last and all(line.endswith(b",") for line in inner) and not last.endswith(b","):
                return [*(line[:-1] for line in inner), last]
        document = json.loads(data)
        if document["schema"] != SCHEMA:
            raise ValueError(f"it is of schema {document['schema']!r}, and this rayft knows {SCHEMA}")
        return [json.dumps({name: plain})[1:-1].encode() for name, plain in document["aliases"].items()]
