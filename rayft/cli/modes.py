"""`--resume`, `--overwrite` and `--new`, for every command that makes a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayft.errors import UsageError

if TYPE_CHECKING:
    from rayft.runs.folder import Mode

OPTIONS: dict[Mode, str] = {
    "resume": "Continue the run of this name.",
    "overwrite": "Replace the run of this name.",
    "new": "Append -2, -3, ... to a name in use.",
}


@dataclass(frozen=True)
class Modes:
    """The options that were given."""

    given: tuple[Mode, ...]

    def one(self) -> Mode:
        """What happens when the run's name is in use. Raises UsageError R111 for two answers at once."""
        if len(self.given) > 1:
            raise UsageError("R111", f"--{' and --'.join(self.given)} exclude each other")
        return self.given[0] if self.given else "fail"


def takes_modes(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a parameter `modes: Modes`, as Typer reads it: with one flag for each of the OPTIONS instead."""
    signature = inspect.signature(command, eval_str=True)
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option(f"--{name}", help=text)],
        )
        for name, text in OPTIONS.items()
    ]
    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "modes"
    ]

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        given = tuple(name for name in OPTIONS if values.pop(name))
        command(modes=Modes(given), **values)

    # In the help the flags follow the first parameter: the recipe.
    parameters = [*others[:1], *flags, *others[1:]]
    with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined] # as inspect reads it
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags
