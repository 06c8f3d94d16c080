"""A vLLM server behind the `Backend` protocol.

Conversations are rendered here, with the template of the adapter, and vLLM continues token ids: so templates, tools and
forms of answers are the same as with rayft's own engine.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerBase

from rayft.errors import UsageError
from rayft.inference.grammar_limits import check
from rayft.inference.grammar_text import to_llguidance
from rayft.inference.request import Overloaded
from rayft.serve.backend import ModelCard, ReplicaState
from rayft.serve.job import Content, Conversation, Job, Piece
from rayft.serve.vllm_adapters import Trust, VllmAdapters
from rayft.serve.vllm_answer import VllmAnswer
from rayft.serve.vllm_client import LoadsNone, UnknownModel, VllmClient
from rayft.serve.voices import Voices


@dataclass(frozen=True)
class Facts:
    """What is known of the base without asking vLLM."""

    name: str
    """As requests may name it."""
    base_hash: str | None
    architecture: str
    dtype: str
    quantization: str | None
    parameters: int
    vocabulary: int


@dataclass(frozen=True)
class VllmLimits:
    max_prompt_tokens: int | None = None
    max_queued_tokens: int = 262144
    max_lora_rank: int | None = None
    """None = vLLM says it."""
    max_loras: int = 0
    """0 = vLLM says it in its metrics, when it has served an adapter."""


class VllmBackend:
    """A `Backend` of one vLLM server. Everything runs in one event loop."""

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        facts: Facts,
        *,
        zero: Content | None = None,
        limits: VllmLimits = VllmLimits(),
        id: str = "0",
    ) -> None:
        """url: of the server. tokenizer: the base's. zero: an adapter that changes nothing, through which the base
        answers (see `vllm_zero`); None = the base answers bare."""
        self.client = VllmClient(url)
        self.adapters = VllmAdapters(self.client, Trust(facts.base_hash, limits.max_lora_rank))
        self.voices = Voices(tokenizer)
        self.facts, self.limits, self.id, self.zero = facts, limits, id, zero
        self.queued_tokens = 0
        """Of prompts that have had no answer yet; vLLM does not count them."""
        self._card: ModelCard | None = None
        self._served = ""
        """What vLLM calls the base."""

    async def close(self) -> None:
        await self.client.close()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Content hashes that vLLM knows."""
        return self.adapters.hashes

    async def card(self) -> ModelCard:
        """Raises UsageError R867."""
        if self._card is None:
            base = next((entry for entry in await self.client.models() if not entry.get("parent")), None)
            if base is None or not base.get("max_model_len"):
                raise UsageError("R867", f"the server at {self.client.url} names no base model", "is this vLLM?")
            self._served = base["id"]
            longest, created = int(base["max_model_len"]), int(base.get("created", 0))
            self._card = ModelCard(**vars(self.facts), max_model_len=longest, created=created)
        return self._card

    async def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        """See `Backend.generate`. Raises also UsageError R866 and R867. An adapter that vLLM has lost, since it was
        started again, is loaded once more."""
        card = await self.card()
        if job.adapter is not None and job.strength != 1:
            raise UsageError("R866", f"vLLM has no strength of adapters; {job.strength:g} was asked for")
        body, answers = await asyncio.to_thread(self._prepare, job, card)
        size = len(body["prompt"])
        if self.queued_tokens > self.limits.max_queued_tokens:
            raise Overloaded("R813", f"{self.queued_tokens} tokens of prompts are waiting", "try again later")
        waiting = size
        self.queued_tokens += size
        try:
            for last_time in (False, True):
                try:
                    async with aclosing(self._answered(job, body, answers)) as batches:
                        async for pieces in batches:
                            self.queued_tokens -= waiting
                            waiting = 0
                            yield pieces
                    return
                except UnknownModel:
                    content = job.adapter or self.zero
                    if last_time or content is None or not waiting:
                        raise
                    self.adapters.forget(content.hash)
        finally:
            self.queued_tokens -= waiting

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        """pinned: vLLM pins nothing; it keeps those that were used last."""
        async with self.adapters.using(content):
            pass

    async def unload(self, hash: str) -> None:
        await self.adapters.unload(hash)

    async def states(self) -> list[ReplicaState]:
        """From vLLM's metrics. Raises UsageError R867."""
        found = _numbers(await self.client.metrics())
        return [
            ReplicaState(
                id=self.id,
                running=int(found.get("vllm:num_requests_running", 0)),
                waiting=int(found.get("vllm:num_requests_waiting", 0)),
                queued_tokens=self.queued_tokens,
                kv_cache_usage=found.get("vllm:kv_cache_usage_perc", 0.0),
                loaded=self.loaded,
                cached=self.loaded,
                max_loras=self.limits.max_loras or int(found.get("max_lora", 0)),
                steps=int(found.get("vllm:iteration_tokens_total_count", 0)),
                preemptions=int(found.get("vllm:num_preemptions_total", 0)),
                prompt_tokens=int(found.get("vllm:prompt_tokens_total", 0)),
                cached_tokens=int(found.get("vllm:prompt_tokens_cached_total", 0)),
                completion_tokens=int(found.get("vllm:generation_tokens_total", 0)),
                memory=int(found.get("process_resident_memory_bytes", 0)),
            )
        ]

    async def _answered(
        self, job: Job, body: dict[str, Any], answers: Sequence[VllmAnswer]
    ) -> AsyncGenerator[Sequence[Piece]]:
        """Pieces of one try. What ends an answer comes last of all, when vLLM has counted the tokens."""
        async with AsyncExitStack() as stack:
            name = await self._name(job, stack)
            chunks = await stack.enter_async_context(aclosing(self.client.completions({**body, "model": name})))
            cached = 0
            gathered: list[Piece] = []
            async for chunk in chunks:
                for choice in chunk.get("choices", ()):
                    for answer in answers if body["n"] != job.n else answers[choice["index"] : choice["index"] + 1]:
                        gathered += answer.take(choice)
                cached = ((chunk.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", cached)
                if gathered and job.stream:
                    yield gathered
                    gathered = []
            yield [*gathered, *(answer.end(len(body["prompt"]), cached) for answer in answers)]

    async def _name(self, job: Job, stack: AsyncExitStack) -> str:
        """What vLLM calls the model of a job; its adapter stays there until ``stack`` ends."""
        if job.adapter is not None:
            return await stack.enter_async_context(self.adapters.using(job.adapter))
        if self.zero is not None:
            try:
                return await stack.enter_async_context(self.adapters.using(self.zero))
            except LoadsNone:
                self.zero = None  # no adapter ever shares a batch with the base
        return self._served

    def _prepare(self, job: Job, card: ModelCard) -> tuple[dict[str, Any], list[VllmAnswer]]:
        """The body of a request to /v1/completions, without the model's name, and who reads the answers."""
        renderer = self.voices.of(job.adapter.path if job.adapter else None)
        ids = renderer.ids(job.prompt)
        sampling = job.sampling
        longest = self.limits.max_prompt_tokens
        if longest is not None and len(ids) > longest:
            raise UsageError("R812", f"the prompt has {len(ids)} tokens, and the limit of this server is {longest}")
        if not ids:
            raise UsageError("R811", "a prompt holds at least one token")
        if job.open_end:
            sampling = replace(sampling, max_new_tokens=max(1, card.max_model_len - len(ids)))
        if (length := len(ids) + sampling.max_new_tokens) > card.max_model_len:
            limit = f"the limit is {card.max_model_len}"
            raise UsageError("R812", f"{len(ids)} tokens of prompt and {length} with the answer: {limit}")
        talk = job.prompt if isinstance(job.prompt, Conversation) else None
        grammar = (renderer.forced_call(talk) if talk else None) or job.grammar
        ends = list(sampling.stop_token_ids)
        if not sampling.ignore_eos and renderer.tokenizer.eos_token_id is not None:
            ends.append(renderer.tokenizer.eos_token_id)  # of an adapter's own template, which vLLM does not know
        body: dict[str, Any] = {
            "prompt": list(ids),
            "stream": job.stream,
            "n": 1 if sampling.greedy else job.n,  # vLLM refuses several greedy answers, which are all the same
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "stop": list(sampling.stop),
            "stop_token_ids": ends,
            "ignore_eos": sampling.ignore_eos,
            "min_tokens": sampling.min_tokens,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if job.stream:
            body["stream_options"] = {"include_usage": True}
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.logit_bias:
            body["logit_bias"] = {str(id): value for id, value in sampling.logit_bias.items()}
        if sampling.logprobs:
            body["logprobs"] = sampling.top_logprobs
        if job.priority:
            body["priority"] = job.priority
        if job.tenant:  # tenants never share cached prefixes
            body["cache_salt"] = hashlib.sha256(job.tenant.encode()).hexdigest()
        if grammar is not None:
            check(grammar)
            body["structured_outputs"] = {"grammar": to_llguidance(grammar)}
        parser = (lambda: renderer.parser(talk)) if talk else (lambda: None)
        answers = [VllmAnswer(index, renderer.tokenizer, parser(), sampling) for index in range(job.n)]
        return body, answers


def _numbers(text: str) -> Mapping[str, float]:
    """Name -> sum over all labels; `max_lora` from the label of `vllm:lora_requests_info`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
            if sample.name == "vllm:lora_requests_info" and sample.labels.get("max_lora", "").isdigit():
                found["max_lora"] = float(sample.labels["max_lora"])
    return found
