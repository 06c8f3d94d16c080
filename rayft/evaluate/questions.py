"""Held-out examples as questions: which of them are asked, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass

from rayft.config.evaluate import Evaluate
from rayft.data import Prepared
from rayft.errors import UsageError


@dataclass(frozen=True)
class Question:
    ids: tuple[int, ...]
    """Everything that the model sees before the answer."""
    shown: str
    """The request as people read it."""
    reference: str


def questions(prepared: Prepared, settings: Evaluate) -> list[Question]:
    """All that `metrics` need (at most `limit`), or as many as there are samples to show.

    Raises:
        UsageError: R704 metrics are asked for, and no held-out example ends with an answer.
    """
    rows = prepared.prompts(settings.limit if settings.metrics else settings.samples)
    if settings.metrics and not rows:
        raise UsageError(
            "R704",
            f"evaluate.metrics: {', '.join(settings.metrics)} compare answers, and no held-out example has one",
            "hold out chats that end with an assistant's turn within data.max_length, or set evaluate.metrics=[]",
        )
    shown = without_frame([row["prompt"] for row in rows])
    return [Question(tuple(row["prompt_ids"]), text, row["reference"]) for row, text in zip(rows, shown, strict=True)]


def without_frame(prompts: list[str]) -> list[str]:
    """Prompts without the lines that all of them begin and end with: system prompt and chat-template tokens.

    Cut at line breaks and special tokens (``<|...|>``), so that words which happen to be common stay whole.
    """
    if len(prompts) < 2:
        return prompts
    head = _common_start(prompts)
    head = head[: max(head.rfind("\n"), head.rfind(">")) + 1]
    rests = [prompt[len(head) :] for prompt in prompts]
    tail = _common_start([rest[::-1] for rest in rests])[::-1]
    starts = [at for mark in ("\n", "<") if (at := tail.find(mark)) >= 0]
    cut = len(tail) - min(starts) if starts else 0
    return [rest[: len(rest) - cut].strip() for rest in rests]


def _common_start(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]
