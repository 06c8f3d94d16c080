"""The DataLoader of one worker."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from rayft.config.train import Train
from rayft.data import Examples
from rayft.data.collate import collate
from rayft.data.micro_batches import MicroBatches


def train_loader(
    examples: Examples,
    batches: MicroBatches,
    settings: Train,
    *,
    padding_free: bool,
    pad_token_id: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Yields `batches` as tensors; nothing in it depends on the global RNG."""
    return DataLoader(
        cast(Dataset[Any], examples),
        batch_sampler=batches,
        collate_fn=partial(collate, padding_free=padding_free, pad_token_id=pad_token_id),
        num_workers=settings.dataloader_num_workers,
        prefetch_factor=settings.dataloader_prefetch_factor if settings.dataloader_num_workers else None,
        pin_memory=pin_memory if settings.dataloader_pin_memory is None else settings.dataloader_pin_memory,
        generator=torch.Generator(),
    )
