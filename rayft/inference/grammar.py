"""What an answer must look like. Plain data: importing it costs nothing, compiling it is done where the model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """A form that an answer must have."""

    kind: GrammarKind
    value: str = ""
    """JSON of a schema; a regular expression that the whole answer matches; JSON of a list of texts; a Lark grammar
    (llguidance's dialect). json_object needs none."""
