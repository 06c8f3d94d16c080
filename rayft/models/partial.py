"""Training part of the weights themselves: last blocks, name patterns, biases, and phases of these."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rayft.config.train import Phase, Trainable
from rayft.errors import UsageError

BIAS_FLAGS = ("attention_bias", "mlp_bias")
"""Switches in a model's config that give its linear layers a bias."""


def selected(model: PreTrainedModel, trainable: Trainable) -> set[str]:
    """Names of the parameters that ``trainable`` chooses; the rows of new tokens always belong to them.

    A head that shares its matrix with the embedding is that matrix: ``last_blocks`` then trains the embedding too.

    Raises:
        UsageError: R326, when a key matches nothing or is no regular expression.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    if trainable.last_blocks is not None:
        chosen |= _last_blocks(model, trainable.last_blocks)
    for pattern in trainable.patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UsageError("R326", f"train.trainable.patterns: {pattern}: {error}") from error
        if not found:
            raise UsageError("R326", f"train.trainable.patterns: {pattern} is in no parameter name like {names[-2]}")
        chosen |= found
    if trainable.bias:
        biases = {name for name in names if name.endswith("bias")}
        if not biases:
            raise UsageError(
                "R326", "train.trainable.bias: this model has no bias", "set train.trainable.add_bias=true too"
            )
        chosen |= biases
    if not chosen:
        raise UsageError("R326", "train.trainable chooses no weights", "set last_blocks, patterns or bias")
    if getattr(model, "new_token_ids", None):
        chosen |= _embeddings(model)
    return chosen


def ever_trained(model: PreTrainedModel, phases: Sequence[Trainable]) -> set[str]:
    """Names of the parameters that some phase chooses."""
    return set().union(*(selected(model, phase) for phase in phases))


def thaw(model: PreTrainedModel, phases: Sequence[Trainable]) -> None:
    """Let everything that some phase trains need gradients, as what is built over the weights of all phases must see
    it: DDP sums the gradients of those parameters only that needed one when it was built."""
    chosen = ever_trained(model, phases)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def apply_phase(model: PreTrainedModel, trainable: Trainable) -> None:
    """Train exactly what ``trainable`` chooses from now on; gradients of everything else are dropped."""
    chosen = selected(model, trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name not in chosen:
            parameter.grad = None


def phase_at(phases: Sequence[Phase], step: int, total_steps: int) -> Phase:
    """The phase in force at optimiser step ``step`` (the first is 0): the last one that has begun."""
    begun = [phase for phase in phases if start_step(phase, total_steps) <= step]
    return begun[-1] if begun else phases[0]


def start_step(phase: Phase, total_steps: int) -> int:
    """First optimiser step of a phase; a start below 1 is a share of all steps."""
    return round(phase.start * total_steps) if phase.start < 1 else int(phase.start)


def add_biases(model: PreTrainedModel) -> None:
    """Give linear layers a bias of zeros wherever the stock architecture can have one; the logits stay what they are.

    The config is switched accordingly, so that stock transformers loads the saved model. Training them alone is BitFit
    (arXiv 2106.10199) for architectures that come without biases.

    Raises:
        UsageError: R327, when the architecture has no such switch and no biases either.
    """
    config = copy.deepcopy(model.config)
    for flag in BIAS_FLAGS:
        if hasattr(config, flag):
            setattr(config, flag, True)
    with torch.device("meta"):
        stock = type(model)(config)
    have = {name for name, _ in model.named_parameters()}
    missing = [name for name, _ in stock.named_parameters() if name not in have and name.endswith(".bias")]
    if not missing and not any(name.endswith("bias") for name in have):
        raise UsageError(
            "R327",
            f"train.trainable.add_bias: {type(model).__name__} has no biases and no switch for them",
            "choose weights with train.trainable.patterns",
        )
    for name in missing:
        layer = model.get_submodule(name.removesuffix(".bias"))
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    for flag in BIAS_FLAGS:
        if hasattr(config, flag):
            setattr(model.config, flag, True)


def _last_blocks(model: PreTrainedModel, count: int) -> set[str]:
    """The last ``count`` blocks and everything that is neither block nor embedding: final norm and head."""
    blocks_name, blocks = _blocks(model)
    kept = {f"{blocks_name}.{i}." for i in range(max(len(blocks) - count, 0), len(blocks))}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    chosen = set()
    for name, parameter in model.named_parameters():
        in_block = name.startswith(f"{blocks_name}.")
        if any(name.startswith(prefix) for prefix in kept) or (not in_block and id(parameter) not in tables):
            chosen.add(name)
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return chosen | {name for name, parameter in model.named_parameters() if id(parameter) in heads}


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise UsageError("R326", "train.trainable.last_blocks: found no list of blocks", "use train.trainable.patterns")


def _embeddings(model: PreTrainedModel) -> set[str]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}
