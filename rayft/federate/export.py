"""A server as a plain PEFT adapter."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from rayft.federate.lora import deployed
from rayft.federate.messages import Server
from rayft.federate.task import Opening, kept_file
from rayft.runs.folder import RunFolder
from rayft.runs.storage import locate


def export(opening: Opening, server: Server, folder: Path) -> None:
    """Write what the server deploys: accumulator and factors as one adapter, for stock PEFT; states of no adapter as
    they are."""
    if opening.config is None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in server.state.items()}, folder / "state.safetensors")
        return
    from rayft.models.save import save_plain

    tensors = deployed(server, opening.alphas)
    config = copy.deepcopy(opening.config)
    if server.accumulator:
        rank = next(len(tensor) for name, tensor in tensors.items() if ".lora_A" in name)
        config.r = config.lora_alpha = rank
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
        config.init_lora_weights = True
    save_plain(config, tensors, folder, opening.tokenizer, opening.origin)


def export_personal(folder: RunFolder, opening: Opening, server: Server, kept: Mapping[int, int]) -> None:
    """fedsa: write `clients/N/adapter` of every client that took part, the shared A with its own B."""
    for client, number in kept.items():
        data = locate(kept_file(folder.path, client, number)).read()
        personal = torch.load(io.BytesIO(data), weights_only=True)["personal"]
        with folder.writing(f"clients/{client}/adapter") as target:
            export(opening, replace(server, state={**server.state, **personal}), target)


def rank_of(server: Server) -> int:
    """Of the exported adapter: that of the factors and of the accumulator together."""
    own = max((len(tensor) for name, tensor in server.state.items() if ".lora_A" in name), default=0)
    return own + max((B.shape[1] for B, _ in server.accumulator.values()), default=0)
