"""What one worker of an offline run does: answer items with an engine of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rayft.errors import RayftError
from rayft.serve.contents import here
from rayft.serve.offline_items import Item
from rayft.serve.plan import Plan


class Worker:
    """In this process, or an actor."""

    def __init__(self, plan: Plan, device: str, threads: int | None) -> None:
        """threads: computing threads; None leaves them as they are."""
        import torch

        from rayft.serve.loading import replica

        if threads is not None:
            torch.set_num_threads(threads)
        self.replica = replica(plan, device)

    async def answer(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """A line for each item, in their order. What is wrong with one of them stands in its line."""
        return list(await asyncio.gather(*map(self._line, items)))

    async def close(self) -> None:
        self.replica.close()

    async def _line(self, item: Item) -> dict[str, Any]:
        head = {"id": item.id, "key": item.key, "adapter": item.adapter}
        tail = {"metadata": item.metadata} if item.metadata is not None else {}
        job = item.job if item.job.adapter is None else replace(item.job, adapter=here(item.job.adapter))
        try:
            pieces = [piece async for batch in self.replica.generate(job) for piece in batch]
        except RayftError as error:
            return {**head, "error": {"id": error.id, "message": error.message}, **tail}
        last = pieces[-1]
        if last.finish_reason in ("error", "cancelled"):
            return {**head, "error": {"id": None, "message": last.error or "cancelled"}, **tail}
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for piece in pieces
            for call in piece.tool_calls
        ]
        assert last.usage is not None
        return {
            **head,
            "text": "".join(piece.text for piece in pieces),
            **({"tool_calls": calls} if calls else {}),
            "finish_reason": last.finish_reason,
            "usage": {"prompt_tokens": last.usage.prompt_tokens, "completion_tokens": last.usage.completion_tokens},
            **tail,
        }
