"""Adapters of several sibling layers as one adapter of the wide layer that computes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rayft.multilora.schemes import LoraWeights


def widened(weights: Mapping[str, LoraWeights], outputs: Mapping[str, slice]) -> LoraWeights:
    """One adapter whose rank is the sum of theirs, and whose B has theirs as blocks; the same numbers in fp32, since it
    only adds products with 0.

    weights: at least one, by the name of a layer. outputs: which outputs of the wide layer are those of a layer. Where
    there is one layer, its tensors are taken as they are.
    """
    if len(outputs) == 1:
        return next(iter(weights.values()))
    first = next(iter(weights.values()))
    ranks = [w.A.shape[0] for w in weights.values()]
    B = first.B.new_zeros(max(rows.stop for rows in outputs.values()), sum(ranks))
    for (name, w), columns in zip(weights.items(), B.split(ranks, dim=1), strict=True):
        ratio = w.scaling / first.scaling if first.scaling else 0.0
        columns[outputs[name]] = w.B if ratio == 1.0 else w.B * ratio
    return LoraWeights(torch.cat([w.A for w in weights.values()]), B, first.scaling)
