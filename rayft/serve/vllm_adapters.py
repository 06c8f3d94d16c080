"""Adapters in a vLLM server: which ones it can serve, their names there, and when they come and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayft.errors import UsageError
from rayft.models.save import BASE
from rayft.multilora.bank import AdapterState
from rayft.serve.job import Content
from rayft.serve.vllm_client import VllmClient

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank`."""
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to begin that leave the base's weights as they were; vLLM refuses the others by their name."""


@dataclass(frozen=True)
class Trust:
    """What an adapter must be to be loaded."""

    base_hash: str | None = None
    max_rank: int | None = None
    """None = vLLM says it."""


@dataclass
class _Entry:
    loading: asyncio.Future[None]
    users: int = 0
    unwanted: bool = False
    """To be unloaded as soon as no job needs it."""


@dataclass
class VllmAdapters:
    """Each content goes by a name of its own, `rayft-HASH`, and lies under a path of its own in the registry: vLLM
    keeps prefix caches by name, and would serve stale ones for a name whose weights have changed. vLLM itself decides
    which adapters stay on the device."""

    client: VllmClient
    trust: Trust = Trust()
    _entries: dict[str, _Entry] = field(default_factory=dict)

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(hash for hash, e in self._entries.items() if e.loading.done() and not e.loading.exception())

    @asynccontextmanager
    async def using(self, content: Content) -> AsyncIterator[str]:
        """The name under which vLLM knows the adapter, which is loaded once for all who ask.

        Raises:
            UsageError: R801, R803, R819 (its files); R866 (vLLM cannot serve it); R867.
        """
        entry = self._entries.get(content.hash)
        if entry is None:
            entry = _Entry(asyncio.ensure_future(self._bring(content)))
            self._entries[content.hash] = entry
        entry.unwanted = False
        entry.users += 1
        try:
            await asyncio.shield(entry.loading)
            yield name_of(content.hash)
        finally:
            entry.users -= 1
            with contextlib.suppress(UsageError):  # the answer is there already
                await self._drop(content.hash, entry)

    async def unload(self, hash: str) -> None:
        """As soon as no job uses it; one that is not here is no error. Raises UsageError R867."""
        if (entry := self._entries.get(hash)) is not None:
            entry.unwanted = True
            await self._drop(hash, entry)

    def forget(self, hash: str) -> None:
        """vLLM has lost it: the next job loads it again."""
        self._entries.pop(hash, None)

    async def _bring(self, content: Content) -> None:
        try:
            await asyncio.to_thread(check, content, self.trust)
            await self.client.load(name_of(content.hash), content.path)
        except BaseException:
            self._entries.pop(content.hash, None)  # the next request tries again
            raise

    async def _drop(self, hash: str, entry: _Entry) -> None:
        if entry.unwanted and not entry.users and self._entries.get(hash) is entry:
            del self._entries[hash]
            await self.client.unload(name_of(hash))


def name_of(hash: str) -> str:
    return f"rayft-{hash}"


def check(content: Content, trust: Trust) -> None:
    """Raises UsageError: R801 (damaged), R803 (of another base), R819 (other files than were registered), R866."""
    state = AdapterState.read(content.path)
    if state.content_hash() != content.hash:
        raise UsageError("R819", f"{content.path} does not hold what was registered as {content.hash[:12]}")
    facts = Path(content.path, BASE)
    trained_on = json.loads(facts.read_text()).get("base_hash") if facts.is_file() else None
    if trust.base_hash and trained_on and trained_on != trust.base_hash:
        raise UsageError("R803", "this adapter was trained on other base weights than those that are served")
    ranks = [tensor.shape[0] for name, tensor in state.tensors.items() if name.endswith(".lora_A.weight")]
    if reason := unsupported(vars(state.config), max(ranks, default=0), trust.max_rank):
        raise UsageError("R866", f"vLLM cannot serve this adapter: {reason}", "see docs/serving-vllm.md")


def unsupported(config: dict[str, Any], rank: int, max_rank: int | None) -> str | None:
    """What vLLM 0.32 does not compute, or None. config: PEFT's `adapter_config.json`."""
    if str(getattr(config.get("peft_type"), "value", config.get("peft_type"))) != "LORA":
        return "it is no LoRA adapter"
    saved = [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    init = config.get("init_lora_weights", True)
    known = {
        "it uses DoRA (use_dora)": config.get("use_dora"),
        f"it trains biases (bias: {config.get('bias')})": config.get("bias", "none") != "none",
        "it has biases of its own (lora_bias)": config.get("lora_bias"),
        f"it holds whole modules (modules_to_save: {', '.join(saved)})": saved,
        "it holds single rows of embeddings (trainable_token_indices)": config.get("trainable_token_indices"),
        "it is an activated LoRA (alora_invocation_tokens)": config.get("alora_invocation_tokens"),
        "it repeats layers (layer_replication)": config.get("layer_replication"),
        "it is block-diagonal (use_bdlora)": config.get("use_bdlora"),
        "it uses QALoRA (use_qalora)": config.get("use_qalora"),
        f"its base was changed when training began (init_lora_weights: {init})": isinstance(init, str)
        and init.lower() not in _INITS,
        f"its rank is {rank}, the largest that vLLM was started for {max_rank} (serve.max_lora_rank)": max_rank
        and rank > max_rank,
    }
    return next((reason for reason, true in known.items() if true), None)


def rank_flag(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds this rank. Raises UsageError R866 above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise UsageError("R866", f"vLLM takes adapters up to rank {RANKS[-1]}; serve.max_lora_rank is {rank}")
