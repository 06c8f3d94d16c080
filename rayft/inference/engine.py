"""Many requests in one batch: the tokens of all of them go through the base model together, each with its adapter.

    engine = Engine(model, tokenizer)
    version = engine.register("runs/orders/adapter", name="orders")
    engine.add(Request("1", ids, adapter="orders"), send=print)
    while engine.busy:
        engine.step()

`add`, `cancel`, `register`, `pin` and `forget` may be called from any thread, `step` from one at a time (see `Runner`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rayft.errors import UsageError
from rayft.inference.adapters import AdapterTable
from rayft.inference.attention import Ragged, layers_of, using
from rayft.inference.batch import pack
from rayft.inference.flight import Flight
from rayft.inference.hf import end_ids
from rayft.inference.kv_cache import KVCache
from rayft.inference.prefix import PrefixCache
from rayft.inference.request import EndReason, Overloaded, Request, TokenEvent
from rayft.inference.sampling import Choice, Chooser, TokenMask, choose
from rayft.inference.scheduler import Scheduler, Share
from rayft.inference.settings import EngineSettings
from rayft.inference.text import TextStream
from rayft.models.prepack import prepack
from rayft.models.siblings import Siblings, watching
from rayft.multilora.bank import AdapterState, Bank
from rayft.multilora.linear import attach
from rayft.multilora.parts import parts_of


@dataclass
class Counters:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    """Of requests that ended, in whatever way; so are the next two. They are the sums of what `Usage` says."""
    cached_tokens: int = 0
    completion_tokens: int = 0


class Engine:
    """One base model and its requests. Takes the model over: its linear layers are shared by adapters from then on."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: EngineSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """model: a causal LM on its device, in the number format of the computation. clock: seconds.

        Raises:
            UsageError: R814, an architecture that the engine cannot compute exactly.
        """
        self.model, self.tokenizer, self.clock = model.eval(), tokenizer, clock
        self.settings = settings = settings or EngineSettings()
        text_config = model.config.get_text_config()
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.max_model_len: int = settings.max_model_len or text_config.max_position_embeddings
        with watching(model) as groups:
            layers = layers_of(model)
        siblings = [Siblings(group) for group in groups]
        prepack(model)
        self.cache = KVCache(layers, settings.kv_cache_tokens, model.device)
        self.prefix = PrefixCache(self.cache, settings.block_size) if settings.enable_prefix_caching else None
        self.mlora = attach(model, siblings=siblings)
        self.adapters = AdapterTable(Bank(self.mlora), settings.max_loras, next(iter(layers.values())).dtype)
        self.scheduler = Scheduler(settings, self.cache, self.prefix, self.adapters)
        self.counters = Counters()
        self._flights: dict[str, Flight] = {}
        self._inbox: deque[Flight | str] = deque()
        """What other threads ask for, until the next step: requests to add, ids to cancel."""
        self._arriving = 0
        """Tokens of the prompts in the inbox."""
        self._books = threading.Lock()
        """For the two above and `_flights`; held for moments."""
        self._stepping = threading.Lock()
        """Held while a step runs, and while adapters change."""

    # --- adapters -----------------------------------------------------------------------------------------------------

    def register(self, source: AdapterState | str | Path, name: str | None = None) -> str:
        """Make an adapter known; returns its content hash. Reading, hashing and preparing it do not hold up steps.

        Raises:
            UsageError: R801 (damaged), R802 (what cannot share a base), R803 (of another base).
        """
        state = source if isinstance(source, AdapterState) else AdapterState.read(source)
        hash = state.content_hash()
        parts = parts_of(state, self.mlora)
        with self._stepping:
            self.adapters.register(parts, hash, name)
        return hash

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, used or not. Raises UsageError R815 (unknown), R816 (no slot is free)."""
        with self._stepping:
            self.adapters.pin(self.adapters.known(name), pinned)

    def forget(self, name: str) -> None:
        """Refuse an adapter from now on, and free it when no request in flight uses it. Raises UsageError R815."""
        with self._stepping:
            self.adapters.forget(self.adapters.known(name))

    # --- requests -----------------------------------------------------------------------------------------------------

    def add(
        self,
        request: Request,
        send: Callable[[TokenEvent], object],
        mask: TokenMask | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Take a request. ``send`` is called with each of its events, in the thread that steps, and must not block.

        tokenizer: writes the answer, and its end token ends it; for adapters that were trained with one of their own.

        Raises:
            UsageError: R811 (a value out of range), R812 (too long), R815 (unknown adapter).
            Overloaded: R813, too much is waiting.
        """
        self.check(request)
        sampling = request.sampling
        tokenizer = tokenizer or self.tokenizer
        ends = frozenset() if sampling.ignore_eos else frozenset(end_ids(self.model, tokenizer))
        masked = frozenset() if mask is None else frozenset(mask.end_ids)
        endings = frozenset(sampling.stop_token_ids) | ends | masked
        chooser = Chooser(sampling, request.prompt, endings, mask)
        text = TextStream(tokenizer, sampling.stop, sampling.min_tokens)
        with self._books:
            if request.id in self._flights:
                raise UsageError("R811", f"a request with the id {request.id} is in flight")
            if not self.has_room:
                raise Overloaded("R813", f"{self.queued_tokens} tokens of prompts are waiting", "try again later")
            adapter = None if request.adapter is None else self.adapters.hold(request.adapter)
            flight = Flight(request, adapter, chooser, text, endings, send, self.clock())
            self._flights[request.id] = flight
            self._arriving += len(request.prompt)
            self._inbox.append(flight)

    def cancel(self, id: str) -> None:
        """End a request, at once or when the step that is running has ended; an id that has ended is no error."""
        self._inbox.append(id)
        if self._stepping.acquire(blocking=False):
            try:
                self._read_inbox()
            finally:
                self._stepping.release()

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._inbox or self.scheduler.running or len(self.scheduler.queue))

    @property
    def has_room(self) -> bool:
        """Whether a request would be taken now, as far as its place in the queue goes."""
        return self.queued_tokens <= self.settings.max_queued_tokens

    @property
    def queued_tokens(self) -> int:
        """Of prompts that wait."""
        return self._arriving + self.scheduler.queue.tokens

    def step(self) -> None:
        """Compute some tokens of some requests and send what they give."""
        with self._stepping, torch.no_grad():
            self._read_inbox()
            shares = self.scheduler.schedule(self.clock())
            if not shares:
                return
            self.counters.steps += 1
            sampling = [share.flight for share in shares if share.samples]
            logits = self._forward(shares)
            for flight, choice in zip(sampling, choose(logits, [f.chooser for f in sampling]), strict=True):
                if flight.chooser.mask is not None and (error := flight.chooser.mask.error) is not None:
                    self._end(flight, "error", error=error)
                else:
                    self._choose(flight, choice)

    def fail(self, error: str) -> None:
        """End all requests with an error: for whoever steps, when a step has raised."""
        with self._stepping:
            self._read_inbox()
            for flight in [*self.scheduler.running, *self.scheduler.queue]:
                self._end(flight, "error", error=error)

    def check(self, request: Request) -> None:
        """Whether a request could be answered, were there nothing else. Raises UsageError R811, R812 or R815."""
        if request.adapter is not None:
            self.adapters.known(request.adapter)
        length = len(request.prompt) + request.sampling.max_new_tokens
        if length > self.max_model_len:
            limit = f"the limit is {self.max_model_len}"
            raise UsageError("R812", f"{len(request.prompt)} tokens of prompt and {length} with the answer: {limit}")
        if not self.cache.fits(length):
            raise UsageError("R812", f"{length} tokens do not fit the cache of {self.cache.budget}")
        named = [*request.prompt, *request.sampling.logit_bias, *request.sampling.stop_token_ids]
        if not 0 <= min(named) <= max(named) < self.vocabulary:
            raise UsageError("R811", f"token ids lie between 0 and {self.vocabulary - 1}")

    def _read_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Flight):
                self.scheduler.add(message)
                with self._books:
                    self._arriving -= len(message.request.prompt)
            elif (flight := self._flights.get(message)) is not None:
                self._end(flight, "cancelled")

    def _forward(self, shares: list[Share]) -> torch.Tensor:
        """[requests that choose a token, vocabulary], in the order of the shares."""
        batch = pack(shares, self.model.device)
        with self.mlora.route(batch.route), using(self.model):
            logits: torch.Tensor = self.model(
                input_ids=batch.ids,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=batch.last,
                ragged=Ragged(batch.decodes, batch.chunks),
            ).logits[0]
        for share in shares:
            assert share.flight.slab is not None
            share.flight.slab.length += share.tokens
            if share.flight.computed == len(share.flight.request.prompt):
                self.scheduler.remember(share.flight)
        return logits[: batch.samples]

    def _choose(self, flight: Flight, choice: Choice) -> None:
        flight.tokens.append(choice.token)
        flight.chooser.chosen(choice.token)
        ended: EndReason | None = None
        if choice.token in flight.end_ids:
            text, ended = flight.text.finish(), "stop"
        else:
            text = flight.text.push(choice.token)
            if flight.text.stopped:
                ended = "stop"
            elif len(flight.chooser.generated) == flight.request.sampling.max_new_tokens:
                text, ended = text + flight.text.finish(), "stop" if flight.text.stopped else "length"
        if ended is None:
            flight.send(TokenEvent(flight.request.id, choice.token, text, choice.logprob, choice.top))
        else:
            self.scheduler.remember(flight)
            self._end(flight, ended, choice, text)

    def _end(
        self,
        flight: Flight,
        reason: EndReason,
        choice: Choice | None = None,
        text: str = "",
        error: str | None = None,
    ) -> None:
        self.scheduler.leave(flight)
        if flight.adapter is not None:
            self.adapters.drop(flight.adapter)
        with self._books:
            del self._flights[flight.request.id]
        usage = flight.usage
        self.counters.prompt_tokens += usage.prompt_tokens
        self.counters.cached_tokens += usage.cached_tokens
        self.counters.completion_tokens += usage.completion_tokens
        token, logprob, top = (choice.token, choice.logprob, choice.top) if choice else (None, None, ())
        flight.send(TokenEvent(flight.request.id, token, text, logprob, top, reason, usage, error))
