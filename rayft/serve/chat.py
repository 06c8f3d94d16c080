"""One conversation with a base and its adapters, side by side: the same questions, each with its own answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft.errors import RayftError, UsageError
from rayft.inference.request import SamplingParams
from rayft.runs.storage import write_atomic
from rayft.serve.job import Content, Conversation, Job

if TYPE_CHECKING:
    from rayft.serve.replica import Replica

HELP = """/reset            begin a new conversation
/system TEXT      what the system message says (also begins anew); without TEXT: none
/temperature X    0 = always the most likely token
/tokens N         the longest answer
/save FILE        the conversations as JSON lines, which can be trained on
/quit             or Ctrl-D"""


@dataclass
class Side:
    """One of those who answer."""

    name: str
    adapter: Content | None
    """None = the bare base."""
    messages: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Answer:
    """What a side has said so far to the last question."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    """Since the question."""
    finish: str | None = None
    error: str | None = None


class Chat:
    """All that `/commands` change, and the conversations."""

    def __init__(
        self, replica: Replica, base_name: str, adapters: Mapping[str, Content], sampling: SamplingParams
    ) -> None:
        self.replica, self.sampling = replica, sampling
        base = Side(f"{base_name} (base)" if adapters else base_name, None)
        self.sides = [base, *(Side(name, content) for name, content in adapters.items())]
        self.system: str | None = None
        self._numbers = itertools.count()

    def reset(self) -> None:
        start = [{"role": "system", "content": self.system}] if self.system else []
        for side in self.sides:
            side.messages = list(start)

    async def ask(self, question: str) -> AsyncIterator[Mapping[str, Answer]]:
        """The answers of all sides, by name, after each change. They are part of the conversations when all have ended;
        of one that is closed before, nothing remains."""
        answers = {side.name: Answer() for side in self.sides}
        began = time.monotonic()
        changed = asyncio.Event()

        async def listen(side: Side) -> None:
            answer = answers[side.name]
            talk = Conversation((*side.messages, {"role": "user", "content": question}))
            job = Job(f"chat-{next(self._numbers)}", talk, self.sampling, side.adapter)
            try:
                async for pieces in self.replica.generate(job):
                    for piece in pieces:
                        answer.text += piece.text
                        answer.finish, answer.error = piece.finish_reason, piece.error
                        answer.tokens = piece.usage.completion_tokens if piece.usage else answer.tokens + 1
                    answer.seconds = time.monotonic() - began
                    changed.set()
            except RayftError as error:
                answer.finish, answer.error = "error", error.message
            changed.set()

        tasks = [asyncio.create_task(listen(side)) for side in self.sides]
        try:
            while not all(task.done() for task in tasks):
                await changed.wait()
                changed.clear()
                yield answers
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for side in self.sides:
            if answers[side.name].error is None:
                said = {"role": "assistant", "content": answers[side.name].text}
                side.messages += [{"role": "user", "content": question}, said]

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; what to show."""
        name, _, value = line.strip().partition(" ")
        value = value.strip()
        try:
            if name == "/reset":
                self.reset()
                return "a new conversation"
            if name == "/system":
                self.system = value or None
                self.reset()
                return "a new conversation" + (" with this system message" if value else " without a system message")
            if name == "/temperature":
                self.sampling = replace(self.sampling, temperature=float(value))
                return f"temperature {self.sampling.temperature:g}"
            if name == "/tokens":
                self.sampling = replace(self.sampling, max_new_tokens=int(value))
                return f"at most {self.sampling.max_new_tokens} tokens"
            if name == "/save":
                return self._save(value)
        except (ValueError, OSError) as error:
            return f"{name}: {error}"
        except UsageError as error:
            return f"{name}: {error.message}"
        return HELP

    def _save(self, path: str) -> str:
        if not path:
            return "/save FILE"
        lines = [json.dumps({"model": side.name, "messages": side.messages}, ensure_ascii=False) for side in self.sides]
        write_atomic(Path(path).expanduser(), "\n".join(lines) + "\n")
        return f"saved {path}"


@contextmanager
def opened(sources: Sequence[str], overrides: Sequence[str], sampling: SamplingParams) -> Iterator[Chat]:
    """A chat with recipes, runs or folders on one base, computed in this process.

    Raises:
        UsageError: R860, R861 (what cannot be served together), R814 (architecture); R1xx recipe, R3xx models, R4xx
            references.
    """
    from rayft.serve.contents import contents, here
    from rayft.serve.loading import replica
    from rayft.serve.plan import plan
    from rayft.train.preparation import device_here

    planned = plan(sources, overrides)
    found = {name: here(content) for name, content in contents(planned).items()}
    started = replica(planned, device_here(planned.recipe))
    try:
        chat = Chat(started, planned.base_name, found, sampling)
        chat.reset()
        yield chat
    finally:
        started.close()
