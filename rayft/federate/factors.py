"""Sums of low-rank products, kept as factors: the exact mean of B A over many clients without a dense matrix.

A product of one module is a pair (B [d, R], A [R, k]), fp64, that stands for B A with every scaling folded in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from rayft.federate.state import State

Product = tuple[torch.Tensor, torch.Tensor]
Products = dict[str, Product]
"""By module name."""

PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def modules(state: State) -> list[str]:
    """The names of the modules whose factors a state holds, without PEFT's prefix."""
    return [name.removeprefix(PREFIX).removesuffix(A_SUFFIX) for name in state if name.endswith(A_SUFFIX)]


def a_name(module: str) -> str:
    return f"{PREFIX}{module}{A_SUFFIX}"


def b_name(module: str) -> str:
    return f"{PREFIX}{module}{B_SUFFIX}"


def letter(name: str) -> str:
    """A or B: which factor a tensor is."""
    return "A" if name.endswith(A_SUFFIX) else "B"


def products(state: State, scalings: Mapping[str, float], weight: float = 1.0) -> Products:
    """weight x scaling x B A of every module."""
    return {
        module: (state[b_name(module)].double() * (weight * scalings[module]), state[a_name(module)].double())
        for module in modules(state)
    }


def stacked(parts: Iterable[Products]) -> Products:
    """The sum of products: B side by side, A one below the other (arXiv 2409.05976). Never wider than the matrix."""
    lists: dict[str, list[Product]] = {}
    for part in parts:
        for module, product in part.items():
            lists.setdefault(module, []).append(product)
    return {module: _joined(pairs) for module, pairs in lists.items()}


def _joined(pairs: Sequence[Product]) -> Product:
    return narrowed((torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs], dim=0)))


def narrowed(product: Product) -> Product:
    """The same product with at most min(d, k) columns: one factor becomes the identity. Nothing is rounded away."""
    B, A = product
    d, k, rank = B.shape[0], A.shape[1], B.shape[1]
    if rank <= min(d, k):
        return product
    dense = B @ A
    return (torch.eye(d, dtype=dense.dtype), dense) if d <= k else (dense, torch.eye(k, dtype=dense.dtype))


def negated(parts: Products) -> Products:
    return {module: (-B, A) for module, (B, A) in parts.items()}


def decomposed(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [d, R], S [R], V^T [R, k]) of B A through two QR decompositions and the SVD of an R x R matrix.

    The signs are made unique: the largest entry of each column of U is positive.
    """
    B, A = narrowed(product)
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(upper @ lower.T)
    U, V = left @ U, V @ right.T
    peaks = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, S, V * signs.T


def truncated(product: Product, rank: int) -> tuple[Product, float]:
    """The nearest product of that rank, and the Frobenius norm of what it lacks (Eckart and Young)."""
    if product[0].shape[1] <= rank:
        return product, 0.0
    U, S, V = decomposed(product)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root, root[:, None] * V[:rank]), float(S[rank:].square().sum().sqrt())


def frobenius(parts: Products) -> float:
    """Frobenius norm over all modules together."""
    return math.sqrt(sum(_squared(product) for product in parts.values()))


def _squared(product: Product) -> float:
    B, A = product
    if B.shape[1] >= min(B.shape[0], A.shape[1]):
        return float((B @ A).square().sum())
    return float((torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T).square().sum())


def gap(exact: Sequence[Products], deployed: Sequence[Products], mean: Products) -> float:
    """|sum of exact - sum of deployed| / |mean|, Frobenius norms over all modules; 0 where the mean is 0.

    Module by module, since both sums together are several times what a server keeps.
    """
    scale = frobenius(mean)
    if not scale:
        return 0.0
    signed = [*((1.0, part) for part in exact), *((-1.0, part) for part in deployed)]
    total = 0.0
    for module in {module: None for _, part in signed for module in part}:
        own = ((sign, part[module]) for sign, part in signed if module in part)
        total += _squared(_joined([(sign * B, A) for sign, (B, A) in own]))
    return math.sqrt(total) / scale
