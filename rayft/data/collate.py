"""Rows of token ids -> the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

Row = Mapping[str, np.ndarray]


def collate(rows: Sequence[Row], padding_free: bool, pad_token_id: int) -> dict[str, torch.Tensor]:
    """One micro-batch of ``rows`` (``input_ids`` int32[L], ``loss_weights`` float32[L], packed bins ``position_ids``).

    Padding-free: the rows end to end, T = the sum of their lengths: ``input_ids`` int64[1,T], ``position_ids``
    int64[1,T] that restart at 0 with each example, ``loss_weights`` float32[1,T]. There is no attention mask: attention
    is kept within each example by the positions alone.

    Padded: ``input_ids`` int64[B,L], ``loss_weights`` float32[B,L], L = the longest row, filled on the right with
    ``pad_token_id`` and weight 0, and ``attention_mask`` int64[B,L]; its first column is always 1, so that no query is
    without a key. Packed bins get ``position_ids`` int64[B,L] instead of the mask, as a mask would switch off their
    isolation; the padding of such a row counts as one more example of weight 0.
    """
    if padding_free:
        return {
            "input_ids": torch.from_numpy(np.concatenate([row["input_ids"] for row in rows]).astype(np.int64))[None],
            "position_ids": torch.from_numpy(np.concatenate([_positions(row) for row in rows]))[None],
            "loss_weights": torch.from_numpy(np.concatenate([row["loss_weights"] for row in rows]))[None],
        }
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    mask = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = row["input_ids"]
        weights[index, :length] = row["loss_weights"]
        mask[index, :length] = 1
        positions[index, :length] = _positions(row)
        positions[index, length:] = np.arange(shape[1] - length)
    batch = {"input_ids": torch.from_numpy(ids), "loss_weights": torch.from_numpy(weights)}
    if any("position_ids" in row for row in rows):
        return {**batch, "position_ids": torch.from_numpy(positions)}
    return {**batch, "attention_mask": torch.from_numpy(mask)}


def _positions(row: Row) -> np.ndarray:
    if "position_ids" in row:
        return row["position_ids"].astype(np.int64)
    return np.arange(len(row["input_ids"]), dtype=np.int64)
