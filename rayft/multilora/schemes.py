"""Three ways to add the updates of several LoRA adapters to the output of one linear layer. All give the same numbers.

Each takes ``x`` [T, in], what the adapters read (dropout is applied already), ``y`` [T, out], what the base gave, the
weights of the adapters that occur and have this module, and the route; and returns [T, out]. Rows that no adapter of
this module owns come back as the base gave them. Matmuls are done in ``y``'s dtype, from fp32 masters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from rayft.models.prepack import Packed, packable
from rayft.multilora.route import Route


class LoraWeights(NamedTuple):
    """One adapter in one module: it adds ``scaling * x A^T B^T``. LoRA, arXiv 2106.09685, section 4.1."""

    A: torch.Tensor
    """[rank, in], as PEFT's ``lora_A.weight``."""
    B: torch.Tensor
    """[out, rank], as PEFT's ``lora_B.weight``."""
    scaling: float


class Together(dict[int, LoraWeights]):
    """The adapters of one layer that a batch mixes, by slot."""

    _stacked: tuple[torch.Tensor, torch.Tensor] | None = None
    _packed: tuple[Packed, Packed] | None = None

    @cached_property
    def ranks(self) -> tuple[tuple[int, int, float], ...]:
        """(slot, rank, scaling) of each."""
        return tuple((slot, w.A.shape[0], w.scaling) for slot, w in self.items())

    @cached_property
    def trained(self) -> bool:
        return any(w.A.requires_grad or w.B.requires_grad for w in self.values())

    def side_by_side(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, in] and B [out, R], R = the sum of the ranks. Adapters that are not trained are copied only once: a
        server would copy them for every token."""
        if torch.compiler.is_compiling() or self.trained:
            return self._copied(dtype)
        if self._stacked is None or self._stacked[0].dtype != dtype:
            self._stacked = self._copied(dtype)
        return self._stacked

    def packed(self, like: torch.Tensor) -> tuple[Packed, Packed] | None:
        """The same two as the CPU likes them, for products in the dtype of ``like``; None where they are trained, and
        where that gains nothing."""
        if torch.compiler.is_compiling() or self.trained or not packable(like):
            return None
        if self._packed is None:
            A, B = self._copied(like.dtype)
            self._packed = Packed(A), Packed(B)
        return self._packed

    def _copied(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.cat([w.A for w in self.values()]).to(dtype)
        B = torch.cat([w.B for w in self.values()], dim=1).to(dtype)
        return A, B


Scheme = Callable[[torch.Tensor, torch.Tensor, Together, Route], torch.Tensor]


def masked(x: torch.Tensor, y: torch.Tensor, weights: Together, route: Route) -> torch.Tensor:
    """All ranks side by side: every row meets every adapter, and a mask keeps what is its own.

    Two dense matmuls whatever the number of adapters and the order of the rows; wasted work grows with the sum of the
    ranks. The mask selects and does not multiply, so that an overflow in one adapter stays in its own rows.
    """
    ranks = weights.ranks
    scale = route.remember(("scale", ranks, y.dtype), lambda: _scales(ranks, route).to(y.dtype))
    foreign = route.remember(("foreign", ranks, y.dtype), lambda: scale == 0)
    if (packed := weights.packed(y)) is not None:
        down, up = packed
        return up.added(y, down.linear(x).mul_(scale).masked_fill_(foreign, 0))
    A, B = weights.side_by_side(y.dtype)
    h = functional.linear(x.to(y.dtype), A)
    return torch.addmm(y, (h * scale).masked_fill(foreign, 0), B.t())


def _scales(ranks: tuple[tuple[int, int, float], ...], route: Route) -> torch.Tensor:
    """float32[T, R]: scaling times strength where a rank belongs to the row's adapter, 0 elsewhere."""
    device = route.slot.device
    owner = torch.tensor([slot for slot, rank, _ in ranks for _ in range(rank)], device=device)
    scaling = torch.tensor([scaling for _, rank, scaling in ranks for _ in range(rank)], device=device)
    scales = torch.where(route.slot[:, None] == owner, scaling, 0.0)
    return scales if route.strength is None else scales * route.strength[:, None]


def segmented(x: torch.Tensor, y: torch.Tensor, weights: Together, route: Route) -> torch.Tensor:
    """Adapter by adapter on its own rows: no wasted work, but a few small matmuls per adapter."""
    if route.order is not None:
        x, y = x[route.order], y[route.order]
    tensors = [tensor for w in weights.values() for tensor in (w.A, w.B)]
    y = _Segmented.apply(x, y, weights, route, *tensors)
    return y if route.inverse is None else y[route.inverse]


class _Segmented(torch.autograd.Function):
    """The updates of all segments in one node of the graph, written into ``y`` where the base left it: autograd's own
    slicing would copy the whole output once per adapter, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, weights: Together, route: Route, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.own = own = [s for s in route.segments if s.slot in weights]
        ctx.columns = {slot: index for index, slot in enumerate(weights)}
        hidden, scales = [], []
        for segment in own:
            rows = slice(segment.start, segment.end)
            w = weights[segment.slot]
            scales.append(_scale(w.scaling, rows, route, y.dtype))
            hidden.append(functional.linear(x[rows].to(y.dtype), w.A.to(y.dtype)).mul_(scales[-1]))
            y[rows].addmm_(hidden[-1], w.B.to(y.dtype).t())
        ctx.scales = scales
        ctx.save_for_backward(x, *hidden, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gy = gradients[0]
        x, *saved = ctx.saved_tensors
        hidden, tensors = saved[: len(ctx.own)], saved[len(ctx.own) :]
        gx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        given: list[torch.Tensor | None] = [None] * len(tensors)
        for segment, h, scale in zip(ctx.own, hidden, ctx.scales, strict=True):
            rows, column = slice(segment.start, segment.end), 2 * ctx.columns[segment.slot]
            A, B = tensors[column : column + 2]
            g = gy[rows]
            gh = (g @ B.to(g.dtype)).mul_(scale)
            given[column] = (gh.t() @ x[rows].to(g.dtype)).to(A.dtype)
            given[column + 1] = (g.t() @ h).to(B.dtype)
            if gx is not None:
                gx[rows] = gh @ A.to(g.dtype)
        return gx, gy, None, None, *given


def _scale(scaling: float, rows: slice, route: Route, dtype: torch.dtype) -> torch.Tensor | float:
    if route.strength is None:
        return scaling
    strength = route.strength if route.order is None else route.strength[route.order]
    return (strength[rows, None] * scaling).to(dtype)


def grouped(x: torch.Tensor, y: torch.Tensor, weights: Together, route: Route) -> torch.Tensor:
    """One grouped matmul over all adapters, ranks padded to the largest: for accelerators with such a kernel.

    ``torch.nn.functional.grouped_mm`` wants rows of a multiple of 16 bytes in every matrix.
    """
    own = [segment for segment in route.segments if segment.slot in weights]
    order = route.order if route.order is not None else torch.arange(route.rows, device=y.device)
    rows = torch.cat([order[segment.start : segment.end] for segment in own])
    ends = torch.tensor([segment.end - segment.start for segment in own], device=y.device).cumsum(0).to(torch.int32)
    widest = max(w.A.shape[0] for w in weights.values())
    rank = -(-widest // 8) * 8
    A = torch.stack([_padded(weights[s.slot].A, rank, 0) for s in own]).to(y.dtype)
    B = torch.stack([_padded(weights[s.slot].B, rank, 1) for s in own]).to(y.dtype)
    ranks = tuple((s.slot, 1, weights[s.slot].scaling) for s in own)
    scale = route.remember(("row scale", ranks), lambda: _scales(ranks, route).sum(1, keepdim=True))[rows].to(y.dtype)
    h = functional.grouped_mm(x[rows].to(y.dtype), A.transpose(1, 2), offs=ends) * scale
    return y.index_add(0, rows, functional.grouped_mm(h, B.transpose(1, 2), offs=ends))


def _padded(matrix: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    missing = rank - matrix.shape[dim]
    return functional.pad(matrix, (0, 0, 0, missing) if dim == 0 else (0, missing))


SCHEMES: dict[str, Scheme] = {"masked": masked, "segmented": segmented, "grouped": grouped}

SEGMENT_COST = {"cpu": 5e6, "packed": 5e7, "cuda": 4e8}
"""Multiply-adds of dense matmul that take as long as the small operations of one more segment, forward and backward.
Measured on a CPU (one thread, 64 to 4096 rows, 8 and 32 adapters of rank 16 and 64), packed without backward in bf16
(two threads, 512 rows, 8 and 16 adapters of rank 16); a guess on a GPU."""


def cheapest(weights: Together, route: Route, y: torch.Tensor) -> str:
    """The scheme to take for this shape: the mask, unless the work it wastes costs more than separate segments.

    While torch.compile traces, always the mask: the others depend on the lengths of the segments.
    """
    if torch.compiler.is_compiling():
        return "masked"
    shape = "scheme", weights.ranks, next(iter(weights.values())).A.shape[1], y.shape[1], y.dtype
    return route.remember(shape, lambda: _cheapest(weights, route, y))


def _cheapest(weights: Together, route: Route, y: torch.Tensor) -> str:
    width = y.shape[1] + next(iter(weights.values())).A.shape[1]
    all_ranks = sum(w.A.shape[0] for w in weights.values())
    own = [segment for segment in route.segments if segment.slot in weights]
    needed = sum((segment.end - segment.start) * weights[segment.slot].A.shape[0] for segment in own)
    wasted = (route.rows * all_ranks - needed) * width
    kind = "packed" if packable(y) and not weights.trained else y.device.type
    if wasted <= SEGMENT_COST.get(kind, SEGMENT_COST["cuda"]) * len(own):
        return "masked"
    return "grouped" if _has_grouped_kernel(y) and len(own) > 2 else "segmented"


def _has_grouped_kernel(y: torch.Tensor) -> bool:
    return y.is_cuda and y.dtype == torch.bfloat16 and torch.cuda.get_device_capability(y.device) >= (8, 0)
