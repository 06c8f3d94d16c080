"""One name and its versions: which contents it ever had, which of them answer now, and how that changes.

Nothing here touches a file: `rayft.runs.registry` keeps what these functions return.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rayft.errors import UsageError

Stage = Literal["none", "staging", "production", "archived"]
What = Literal["register", "promote", "weigh", "rollback", "pin", "unpin", "strength", "remove"]
STAGES: tuple[Stage, ...] = ("none", "staging", "production", "archived")
_REMEMBERED = 200
"""Events that are kept of each alias."""


@dataclass(frozen=True)
class Version:
    """One content that a name has, or had."""

    number: int
    """1, 2, ...; never given twice."""
    hash: str
    """Of tensors and config (`rayft.runs.content.lora_hash`)."""
    path: str
    """Absolute folder of the registry's own copy: a stock adapter with its tokenizer and chat template."""
    base_hash: str | None
    """Of the base weights it was trained on, where the run or `base.json` says so."""
    base_name: str | None
    """`base_model_name_or_path` of its `adapter_config.json`."""
    source: str
    """What the user named: `run:NAME@step-20`, a folder, ..."""
    run: str | None
    """Name of the run it comes from."""
    step: int | None
    """Of the checkpoint it comes from; None for a final adapter."""
    rank: int
    """The largest one of its layers."""
    size: int
    """Bytes of the copy."""
    created: float
    """Seconds since the epoch."""
    stage: Stage = "none"
    note: str = ""


@dataclass(frozen=True)
class Split:
    """Who answers: shares of the requests by version number, and the stage of every version."""

    weights: Mapping[int, float]
    stages: Mapping[int, Stage]


@dataclass(frozen=True)
class Event:
    """One change of an alias."""

    time: float
    """Seconds since the epoch."""
    what: What
    version: int | None
    """The one version it was about, if it was one."""
    who: str | None
    before: Split
    after: Split


@dataclass(frozen=True)
class Alias:
    """A name that requests use, and the versions behind it."""

    name: str
    versions: tuple[Version, ...] = ()
    """By number."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """Version number -> share of the requests, above 0; they sum to 1. Empty = nothing is served under this name."""
    pinned: bool = False
    """Whether replicas keep it on the device, used or not."""
    strength: float = 1.0
    """Factor on what the adapter adds to the base."""
    salt: str = ""
    """Makes the split of sticky keys independent of other aliases'."""
    history: tuple[Event, ...] = ()
    """The last 200 changes, oldest first."""
    registered: int = 0
    """The highest version number that was ever given."""

    def version(self, number: int) -> Version:
        """Raises UsageError R423 for a number that this alias does not have."""
        for version in self.versions:
            if version.number == number:
                return version
        there = ", ".join(str(version.number) for version in self.versions) or "none"
        raise UsageError("R423", f"{self.name!r} has no version {number}", f"its versions: {there}")

    @property
    def production(self) -> Version | None:
        return next((version for version in self.versions if version.stage == "production"), None)

    @property
    def split(self) -> Split:
        return Split(self.weights, {version.number: version.stage for version in self.versions})


def registered(alias: Alias, version: Version, who: str | None = None) -> Alias:
    """With one more version, which does not answer yet."""
    more = replace(alias, versions=(*alias.versions, version), registered=version.number)
    return _noted(alias, more, "register", version.number, who)


def promoted(alias: Alias, number: int, who: str | None = None) -> Alias:
    """With one version in production, which gets every request; the one before it is archived.

    Raises UsageError R423.
    """
    alias.version(number)
    former = alias.production
    stages: dict[int, Stage] = {number: "production"}
    if former is not None and former.number != number:
        stages[former.number] = "archived"
    return _noted(alias, _staged(replace(alias, weights={number: 1.0}), stages), "promote", number, who)


def weighed(alias: Alias, weights: Mapping[int, float], who: str | None = None) -> Alias:
    """With requests split by ``weights``, which need not sum to 1; a version that is not named, or has 0, gets none.

    A version that gets requests for the first time, or again, is in staging.

    Raises UsageError: R423, R427 (negative, not finite, or nothing left).
    """
    for number, weight in weights.items():
        alias.version(number)
        if not (isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0):
            raise UsageError("R427", f"the weight {weight!r} of version {number} is not a number from 0 on")
    total = math.fsum(weights.values())
    shares = {number: weight / total for number, weight in sorted(weights.items()) if weight > 0} if total else {}
    if not shares or not math.isfinite(total):
        raise UsageError("R427", f"these weights leave {alias.name!r} without a version", "give one of them a weight")
    stages: dict[int, Stage] = {n: "staging" for n in shares if alias.version(n).stage in ("none", "archived")}
    return _noted(alias, _staged(replace(alias, weights=shares), stages), "weigh", None, who)


def rolled_back(alias: Alias, who: str | None = None) -> Alias:
    """With stages and weights as they were before the last `promoted` or `weighed` that was not taken back yet.

    Raises UsageError R429, when there is none, nothing was served before it, or what was served is removed by now.
    """
    undone = 0
    for event in reversed(alias.history):
        if event.what == "rollback":
            undone += 1
        elif event.what in ("promote", "weigh"):
            if undone == 0:
                return _as_before(alias, event, who)
            undone -= 1
    raise UsageError("R429", f"{alias.name!r} was neither promoted nor weighed: there is nothing to go back to")


def removed(alias: Alias, number: int, who: str | None = None) -> Alias:
    """Without one version. Raises UsageError: R423, R428 while it gets requests."""
    alias.version(number)
    if number in alias.weights:
        share = alias.weights[number]
        raise UsageError(
            "R428", f"version {number} of {alias.name!r} gets {share:.0%} of the requests", "promote another one first"
        )
    fewer = replace(alias, versions=tuple(version for version in alias.versions if version.number != number))
    return _noted(alias, fewer, "remove", number, who)


def pinned(alias: Alias, value: bool, who: str | None = None) -> Alias:
    return _noted(alias, replace(alias, pinned=value), "pin" if value else "unpin", None, who)


def strengthened(alias: Alias, strength: float, who: str | None = None) -> Alias:
    """With another factor on what the adapter adds. Raises UsageError R427 for one that is not finite."""
    if not math.isfinite(strength):
        raise UsageError("R427", f"the strength {strength!r} is not a finite number")
    return _noted(alias, replace(alias, strength=float(strength)), "strength", None, who)


def _as_before(alias: Alias, event: Event, who: str | None) -> Alias:
    there = {version.number for version in alias.versions}
    if not event.before.weights:
        raise UsageError(
            "R429", f"nothing was served as {alias.name!r} before: there is nothing to go back to", "or remove the name"
        )
    if gone := sorted(set(event.before.weights) - there):
        raise UsageError("R429", f"version {gone[0]} of {alias.name!r}, which answered before, was removed since")
    stages = {number: stage for number, stage in event.before.stages.items() if number in there}
    return _noted(alias, _staged(replace(alias, weights=event.before.weights), stages), "rollback", None, who)


def _staged(alias: Alias, stages: Mapping[int, Stage]) -> Alias:
    return replace(
        alias,
        versions=tuple(replace(version, stage=stages.get(version.number, version.stage)) for version in alias.versions),
    )


def _noted(before: Alias, after: Alias, what: What, version: int | None, who: str | None) -> Alias:
    """With the change in its history; what changed nothing is no event, so that it cannot be taken back either."""
    if after == before and what != "rollback":
        return before
    event = Event(time.time(), what, version, who, before.split, after.split)
    return replace(after, history=(*before.history, event)[-_REMEMBERED:])
