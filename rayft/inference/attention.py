"""Attention over one packed row [1, T] in which the tokens of many requests lie end to end.

Registered with transformers, so that its models run unmodified: they are called with ``ragged=`` (see `Ragged`), which
reaches this function through their keyword arguments. There is no mask over pairs of requests, and no cache object.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from rayft.errors import UsageError
from rayft.inference.kv_cache import LayerShape, Shelf, Slab

NAME = "rayft_ragged"
"""The `attn_implementation` that this module registers with transformers when it is imported."""


MATMUL_FROM = 8
"""Requests that decode together from which on the CPU computes attention in bf16 with matmuls. Measured with 3 heads of
64 and 64 to 640 keys: 1.3 to 2 times as fast with 16 and 64 requests, slower with one."""


class Layer(NamedTuple):
    """How one layer attends."""

    number: int
    scale: float
    """Multiplies the scores."""
    window: int | None
    """A token sees itself and ``window`` - 1 tokens before it; None = all."""
    softcap: float | None
    """Scores x become ``softcap * tanh(x / softcap)``, as in Gemma-2."""


class Attending(Protocol):
    """What a model is called with as ``ragged=``."""

    def attend(self, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [T, heads, D], key [T, kv heads, D], value [T, kv heads, Dv] -> [T, heads, Dv]."""
        ...


@dataclass
class Decode:
    """Neighbouring slabs of one shelf whose requests add one token each."""

    shelf: Shelf
    rows: slice
    start: int
    """Where their tokens begin in the packed row; they lie there in the order of the slabs."""
    positions: list[int]
    """Of the new token in its request."""
    index: torch.Tensor = field(init=False)
    """int64[n]: the positions, on the device."""
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shelf = self.shelf
        self.index = torch.tensor(self.positions, device=shelf.device)
        self.row = torch.arange(len(self.positions), device=shelf.device)
        bf16_on_cpu = shelf.dtype == torch.bfloat16 and shelf.device.type == "cpu"
        self.by_matmul = bf16_on_cpu and len(self.positions) >= MATMUL_FROM
        """Two batched matmuls over whole slabs are faster than the CPU's fused kernel in bf16; over a part of each slab
        they would have to copy it."""
        self.longest = shelf.capacity if self.by_matmul else max(self.positions) + 1

    def lowest(self, window: int | None) -> int:
        """The first position that any of the requests still sees."""
        return 0 if window is None or self.by_matmul else max(0, min(self.positions) - window + 1)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """[n, 1, 1, keys]: what is added to the scores of the keys from `lowest` to `longest`; None = nothing."""
        if window not in self.masks:
            low = self.lowest(window)
            position = torch.arange(low, self.longest, device=self.shelf.device)
            seen = position <= self.index[:, None]
            if window is not None:
                seen &= position > self.index[:, None] - window
            everything = len(set(self.positions)) == 1 and not self.by_matmul
            self.masks[window] = None if everything else _added(seen, self.shelf)[:, None, None]
        return self.masks[window]


@dataclass
class Chunk:
    """Consecutive tokens of one request: a prompt, or a piece of one."""

    slab: Slab
    start: int
    """Where they begin in the packed row."""
    past: int
    """Tokens of the request that are stored already."""
    length: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def lowest(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.past - window + 1)

    def mask(self, window: int | None) -> torch.Tensor:
        """[length, keys]: what is added to the scores of the keys from `lowest` on."""
        if window not in self.masks:
            device = self.slab.shelf.device
            own = torch.arange(self.past, self.past + self.length, device=device)[:, None]
            position = torch.arange(self.lowest(window), self.past + self.length, device=device)
            seen = position <= own
            if window is not None:
                seen &= position > own - window
            self.masks[window] = _added(seen, self.slab.shelf)
        return self.masks[window]


@dataclass
class Ragged:
    """One forward pass: what each stretch of the packed row belongs to, in its order."""

    decodes: list[Decode]
    chunks: list[Chunk]

    def attend(self, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values, and let each token see those of its own request up to itself."""
        outputs = [_decode(group, layer, query, key, value) for group in self.decodes]
        outputs += [_chunk(chunk, layer, query, key, value) for chunk in self.chunks]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _decode(group: Decode, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    count, heads = len(group.positions), query.shape[1]
    own = slice(group.start, group.start + count)
    keys, values = group.shelf.keys[layer.number][group.rows], group.shelf.values[layer.number][group.rows]
    keys[group.row, :, group.index] = key[own]
    values[group.row, :, group.index] = value[own]
    seen = slice(group.lowest(layer.window), group.longest)
    # The query heads that share a key-value head are its "length", so that nothing is repeated.
    tall = query[own].reshape(count, keys.shape[1], heads // keys.shape[1], -1)
    attend = _matmuls if group.by_matmul or layer.softcap is not None else _sdpa
    output = attend(tall, keys[:, :, seen], values[:, :, seen], group.mask(layer.window), layer)
    return output.reshape(count, heads, -1)


def _chunk(chunk: Chunk, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    own = slice(chunk.start, chunk.start + chunk.length)
    end = chunk.past + chunk.length
    shelf, row = chunk.slab.shelf, chunk.slab.row
    keys, values = shelf.keys[layer.number][row], shelf.values[layer.number][row]
    keys[:, chunk.past : end] = key[own].transpose(0, 1)
    values[:, chunk.past : end] = value[own].transpose(0, 1)
    seen = slice(chunk.lowest(layer.window), end)
    whole = chunk.past == 0 and (layer.window is None or chunk.length <= layer.window) and layer.softcap is None
    mask = None if whole else chunk.mask(layer.window)
    rows = query[own].transpose(0, 1)[None]
    if layer.softcap is None:
        output = _sdpa(rows, keys[None, :, seen], values[None, :, seen], mask, layer, causal=whole)
    else:
        output = _matmuls(rows, keys[None, :, seen], values[None, :, seen], mask, layer)
    return output[0].transpose(0, 1)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    layer: Layer,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """[B, heads, Q, D] over [B, kv heads, K, D] -> [B, heads, Q, Dv]; ``mask`` is added to the scores."""
    shared = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=layer.scale, enable_gqa=shared
    )


def _matmuls(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, layer: Layer
) -> torch.Tensor:
    """The same, written out, with Gemma-2's cap on the scores."""
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores, scale = query @ key.transpose(2, 3), layer.scale
    if layer.softcap is not None:
        scores, scale = torch.tanh(scores.float() * (scale / layer.softcap)) * layer.softcap, 1.0
    scores = scores.float() * scale if mask is None else torch.add(mask, scores, alpha=scale)
    return scores.softmax(-1).to(value.dtype) @ value


def _added(seen: torch.Tensor, shelf: Shelf) -> torch.Tensor:
    """0 where a key is seen, else -inf. In fp32 on a CPU, which `_matmuls` then adds in; kernels on a GPU want the
    dtype of the query."""
    dtype = torch.float32 if shelf.device.type == "cpu" else shelf.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


class _Probe:
    """Records what each layer would store."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def attend(self, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.layers[layer.number] = LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype)
        return query.new_zeros(*query.shape[:2], value.shape[2])


def layers_of(model: PreTrainedModel) -> dict[int, LayerShape]:
    """What each attention layer of a model stores, seen in a forward pass over one token.

    Raises:
        UsageError: R814, an architecture that this attention cannot compute exactly.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _unsuited(model, f"has layers of the kind {', '.join(sorted(kinds))}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _unsuited(model, "shares keys and values between layers")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise _unsuited(model, f"turns positions by the longest request of a batch ({parameters['rope_type']})")
    probe = _Probe()
    with torch.no_grad(), using(model):
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=one, position_ids=one, use_cache=False, ragged=probe)
    if len(probe.layers) != config.num_hidden_layers:
        raise _unsuited(
            model, f"has {config.num_hidden_layers} layers, of which {len(probe.layers)} attend in this way"
        )
    return probe.layers


@contextmanager
def using(model: PreTrainedModel) -> Iterator[None]:
    """Forward passes inside take ``ragged=``; outside the model is as it was."""
    config = model.config.get_text_config()
    former = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = former


def _unsuited(model: PreTrainedModel, reason: str) -> UsageError:
    return UsageError("R814", f"the engine cannot run {type(model).__name__}, which {reason}")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    ragged: Attending | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [1, heads, T, D], ``key`` and ``value`` [1, kv heads, T, D] -> [1, T, heads, D]."""
    index = getattr(module, "layer_idx", None)
    causal = getattr(module, "is_causal", True)
    if ragged is None or index is None or not causal or s_aux is not None or position_bias is not None:
        raise UsageError("R814", f"the engine cannot run {type(module).__name__}: it wants more than plain attention")
    output = ragged.attend(
        Layer(index, query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
    )
    return output[None], None


AttentionInterface.register(NAME, _attention)
