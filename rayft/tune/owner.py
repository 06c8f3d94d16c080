"""The study in an actor, and what lanes and driver hold of it."""

from __future__ import annotations

from typing import Any

from rayft.config.resolve import Resolved
from rayft.tune.study import Study


class StudyActor:
    """A `Study`, or what stands in for one, that many processes ask.

    Opening it may fail for reasons that the user can mend. An actor that fails in its constructor cannot say so, hence
    `open`.
    """

    def __init__(self, environment: dict[str, str], study: Any = None) -> None:
        """environment: variables of every lane; their values are kept in memory only."""
        self._environment = environment
        self._study = study

    def open(self, resolved: Resolved, folder: str, options: dict[str, Any]) -> None:
        """The arguments of `Study`; raises what it raises."""
        self._study = Study(resolved, folder, **options)

    def environment(self) -> dict[str, str]:
        return self._environment

    def ask(self, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a method of the study."""
        return getattr(self._study, method)(*arguments, **options)


class Remote:
    """A study in an actor, with the methods of a `Study`. Errors come as they were raised there."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def open(self, resolved: Resolved, folder: str, options: dict[str, Any]) -> None:
        answer(self.actor.open.remote(resolved, folder, options))

    def environment(self) -> dict[str, str]:
        found: dict[str, str] = answer(self.actor.environment.remote())
        return found

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments, **options: answer(self.actor.ask.remote(method, arguments, options))


def answer(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
