"""The command line: one sub-command per verb. It parses, calls one function of a verb, prints. No logic lives here.

Verbs are imported inside their commands, so that `rayft --help` answers without torch, Ray or transformers.
"""

from rayft.cli.app import app, main

__all__ = ["app", "main"]
