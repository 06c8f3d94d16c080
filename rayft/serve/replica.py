"""One engine behind the `Backend` protocol: it renders prompts, brings adapters in, and turns tokens into pieces."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.inference.guide import Guides
from rayft.inference.hf import end_ids
from rayft.inference.request import Request, TokenEvent
from rayft.inference.runner import Order, Runner
from rayft.inference.settings import EngineSettings
from rayft.serve.backend import ModelCard, ReplicaState
from rayft.serve.host_cache import HostCache
from rayft.serve.job import Content, Conversation, Job, Piece, Token, ToolCall
from rayft.serve.tool_parser import ToolParser
from rayft.serve.voices import Voices


@dataclass(frozen=True)
class Limits:
    """What a replica accepts, beyond what its engine can do."""

    host_cache: int = 2 * 2**30
    """Bytes of adapters in host memory."""
    max_lora_rank: int = 256
    max_prompt_tokens: int | None = None


class Replica:
    """A `Backend` of one engine in this process. `close` ends its thread."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        base_hash: str | None = None,
        quantization: str | None = None,
        settings: EngineSettings | None = None,
        limits: Limits = Limits(),
        id: str = "0",
    ) -> None:
        """model, tokenizer: as for `Engine`. name: of the base, as requests may say it. base_hash: of its weights.

        Raises:
            UsageError: R814, an architecture that the engine cannot compute exactly.
        """
        parameters = _parameters(model)
        self.id, self.limits = id, limits
        self.engine = Engine(model, tokenizer, settings)
        self.runner = Runner(self.engine)
        self.cache = HostCache(self.engine, limits.host_cache, limits.max_lora_rank, base_hash)
        self.voices = Voices(tokenizer)
        self.guides = Guides(self.engine.vocabulary)
        self._card = ModelCard(
            name=name,
            base_hash=base_hash,
            architecture=type(model).__name__,
            dtype=str(next(iter(self.engine.cache.layers.values())).dtype).removeprefix("torch."),
            quantization=quantization,
            parameters=parameters,
            vocabulary=self.engine.vocabulary,
            max_model_len=self.engine.max_model_len,
            created=int(time.time()),
        )
        self.runner.start()

    def close(self) -> None:
        self.runner.stop()

    @property
    def queued_tokens(self) -> int:
        """Of the prompts that wait."""
        return self.engine.queued_tokens

    @property
    def loaded(self) -> tuple[str, ...]:
        """Content hashes in device slots."""
        return tuple(self.engine.adapters.loaded)

    def check(self) -> None:
        """Nothing: this engine ends with its process."""

    async def card(self) -> ModelCard:
        return self._card

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        """See `Backend.generate`."""
        async with AsyncExitStack() as stack:
            if job.adapter is not None:
                await stack.enter_async_context(self.cache.using(job.adapter))
            orders, answers = await asyncio.to_thread(self._prepare, job)
            index = {order.request.id: answer for order, answer in zip(orders, answers, strict=True)}
            batches = self.runner.submit_all(orders)
            stack.push_async_callback(batches.aclose)
            pieces: list[Piece] = []
            async for events in batches:
                pieces += [piece for event in events if (piece := index[event.id].piece(event)) is not None]
                if pieces and job.stream:
                    yield pieces
                    pieces = []
            if pieces:
                yield pieces

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        await self.cache.load(content, pinned)

    async def unload(self, hash: str) -> None:
        await self.cache.unload(hash)

    async def states(self) -> list[ReplicaState]:
        engine, counters = self.engine, self.engine.counters
        gpu = torch.cuda.is_available()
        return [
            ReplicaState(
                id=self.id,
                running=len(engine.scheduler.running),
                waiting=len(engine.scheduler.queue),
                queued_tokens=self.queued_tokens,
                kv_cache_usage=engine.cache.used / engine.cache.budget,
                loaded=self.loaded,
                cached=self.cache.hashes,
                max_loras=engine.settings.max_loras,
                steps=counters.steps,
                preemptions=engine.scheduler.preemptions,
                prompt_tokens=counters.prompt_tokens,
                cached_tokens=counters.cached_tokens,
                completion_tokens=counters.completion_tokens,
                memory=psutil.Process(os.getpid()).memory_info().rss,
                gpu_memory=torch.cuda.memory_allocated() if gpu else None,
                gpu_utilization=torch.cuda.utilization() / 100 if gpu else None,
            )
        ]

    def _prepare(self, job: Job) -> tuple[list[Order], list[_Answer]]:
        """The requests of a job's answers, with the same prompt and each with a seed of its own, and who reads them."""
        renderer = self.voices.of(job.adapter.path if job.adapter else None)
        ids = renderer.ids(job.prompt)
        longest = self.limits.max_prompt_tokens
        if longest is not None and len(ids) > longest:
            raise UsageError("R812", f"the prompt has {len(ids)} tokens, and the limit of this server is {longest}")
        sampling = job.sampling
        if job.open_end:
            sampling = replace(sampling, max_new_tokens=max(1, self.engine.max_model_len - len(ids)))
        talk = job.prompt if isinstance(job.prompt, Conversation) else None
        grammar = (renderer.forced_call(talk) if talk else None) or job.grammar
        ends = end_ids(self.engine.model, renderer.tokenizer)
        orders, answers = [], []
        for number in range(job.n):
            seed = None if sampling.seed is None else sampling.seed + number
            request = Request(
                f"{job.id}-{number}",
                ids,
                job.adapter.hash if job.adapter else None,
                job.strength,
                replace(sampling, seed=seed),
                job.tenant,
                job.priority,
            )
            self.engine.check(request)
            mask = self.guides.guide(grammar, renderer.tokenizer, ends) if grammar else None
            orders.append(Order(request, mask, renderer.tokenizer))
            answers.append(_Answer(number, renderer.tokenizer, renderer.parser(talk) if talk else None))
        return orders, answers


class _Answer:
    """One answer of a job on its way to the client."""

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase, parser: ToolParser | None) -> None:
        self.index, self.tokenizer, self.parser = index, tokenizer, parser
        self._called = False

    def piece(self, event: TokenEvent) -> Piece | None:
        """None for a token that says nothing yet: half a character, what may become a stop text or a call."""
        text, calls = self._read(event)
        self._called = self._called or bool(calls)
        reason = event.finish_reason
        tokens = () if event.logprob is None else (self._token(event),)
        if not (text or calls or tokens or reason):
            return None
        finish = "tool_calls" if reason == "stop" and self._called else reason
        return Piece(self.index, text, tokens, calls, finish, event.usage, event.error)

    def _read(self, event: TokenEvent) -> tuple[str, tuple[ToolCall, ...]]:
        """(content, calls) that are certain now."""
        if self.parser is None:
            return event.text, ()
        text, calls = self.parser.push(event.text)
        if event.finish_reason is not None:
            rest, more = self.parser.finish()
            text, calls = text + rest, (*calls, *more)
        return text, calls

    def _token(self, event: TokenEvent) -> Token:
        assert event.token is not None
        top = tuple((id, self.tokenizer.decode([id]), logprob) for id, logprob in event.top_logprobs)
        return Token(event.token, self.tokenizer.decode([event.token]), event.logprob, top)


def _parameters(model: Any) -> int:
    """Of the model as it was before quantisation; a tensor that two layers share counts once."""
    return int(model.num_parameters())
