"""Trained weights on disk: a stock PEFT adapter or a stock transformers model, and the way back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rayft.config.model import Model
from rayft.errors import RunFailed, UsageError
from rayft.models import hub
from rayft.models.identity import base_hash
from rayft.models.load import DTYPES, Origin, has_native_bf16, load_model, quantization_config

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE = "base.json"
"""Beside an adapter: which base it belongs to, by name, revision, hash and quantisation."""


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    state_dict: dict[str, Any] | None = None,
) -> Literal["adapter", "model"]:
    """Write the model of `adapters.attach` for stock loaders: adapter or model, tokenizer and chat template.

    An adapter that changed its base when it was initialised (PiSSA, OLoRA) is written as the plain LoRA of twice the
    rank that does the same on the unchanged base. state_dict: the whole weights where ``model`` holds only shards.

    Raises:
        RunFailed: R330, when the adapter came out empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel):
        _save_adapter(model, folder, state_dict)
        return "adapter"
    assert isinstance(model, PreTrainedModel)
    _save_model(model, folder, state_dict)
    return "model"


def save_plain(
    config: PeftConfig,
    tensors: dict[str, torch.Tensor],
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin,
) -> None:
    """Write an adapter that is on no model as `save` would: config and tensors by PEFT's names, tokenizer, base."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    _name_base(config, origin)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)
    _write_origin(folder, origin)


def load_trained(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Anything that `save` wrote, in evaluation mode, with its tokenizer; the base quantised as it was in training.

    Raises:
        UsageError: R331 (nothing of ours in the folder), R332 (the base's weights have changed), R3xx of the base.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        raise UsageError("R331", f"{folder} holds neither an adapter nor a model")
    if dtype == "auto":
        dtype = "bf16" if has_native_bf16(device) else "fp32"
    tokenizer = saved_tokenizer(folder, trust_remote_code=trust_remote_code)
    if (folder / ADAPTER_CONFIG).exists():
        model = _load_adapter(folder, tokenizer, device, DTYPES[dtype], trust_remote_code)
    else:
        model = load_model(str(folder), device=device, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


def saved_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside trained weights. Raises UsageError R316 for damaged files."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises nothing finer
        raise UsageError("R316", f"cannot load the tokenizer of {folder}: {error}") from error
    return tokenizer


def cast_weights(folder: str | Path, dtype: str) -> None:
    """Round the floating-point weights of a model folder to ``dtype`` (bf16, fp16, fp32), and note it in its config."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_adapter(model: PeftModel, folder: Path, state_dict: dict[str, Any] | None) -> None:
    origin: Origin = model.origin
    config = model.peft_config["default"]
    _name_base(config, origin)
    pattern = getattr(config, "rank_pattern", None)
    # Never the whole embedding: PEFT would add it for new tokens, whose rows are in the adapter anyway.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_check_not_empty` looks for what PEFT warns of
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
    if pattern is not None:
        config.rank_pattern = pattern  # PEFT renames AdaLoRA's entries while it saves them
    if initial := getattr(model, "initial_state", None):
        _convert_to_lora(folder, initial)
    _check_not_empty(model, folder)
    _write_origin(folder, origin)


def _name_base(config: PeftConfig, origin: Origin) -> None:
    from_hub = hub.kind_of(origin.base) == "hub"
    config.base_model_name_or_path = origin.base if from_hub else origin.folder
    config.revision = origin.revision if from_hub else None


def _write_origin(folder: Path, origin: Origin) -> None:
    facts = {
        "base": origin.base,
        "revision": origin.revision,
        "base_hash": base_hash(origin.folder),
        "quantization": origin.quantization,
        "bnb_4bit_use_double_quant": origin.double_quantization,
    }
    (folder / BASE).write_text(json.dumps(facts, indent=2) + "\n")


def _convert_to_lora(folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """From ``W = W_res + s B0 A0`` follows ``W_res + s B A = W + s [B, -B0] [A; A0]``: a LoRA of twice the rank on W.

    Section 4 and appendix C of PiSSA (arXiv 2404.02948). Scaling stays s: alpha doubles with the rank, and under
    rsLoRA, where s is alpha / sqrt(rank), it grows by the root of 2.
    """
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, start in initial.items():
        if "lora_A" in name:
            tensors[name] = torch.cat([tensors[name], start.to(tensors[name])], dim=0)
        elif "lora_B" in name:
            tensors[name] = torch.cat([tensors[name], -start.to(tensors[name])], dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    for key, factor in (("rank_pattern", 2), ("alpha_pattern", 2**0.5 if config["use_rslora"] else 2)):
        config[key] = {name: value * factor for name, value in (config.get(key) or {}).items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_not_empty(model: PeftModel, folder: Path) -> None:
    """Catch what sharded training can do to a saved adapter: no tensors, empty ones, zeros instead of values."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    trained = any(parameter.count_nonzero() for name, parameter in model.named_parameters() if "lora_B" in name)
    values = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    may_be_empty = model.peft_config["default"].peft_type == "ADALORA"  # it can take a layer's whole rank away
    empty = not tensors or (not may_be_empty and any(not tensor.numel() for tensor in tensors.values()))
    if empty or (trained and not any(map(torch.any, values))):
        raise RunFailed("R330", f"the adapter in {folder} came out empty", "keep the checkpoint and report this")


def _save_model(model: PreTrainedModel, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """A stock model folder: masters in fp32, frozen weights in the number format they were used in."""
    model.config.use_cache = True  # switched off for training only
    model.save_pretrained(folder, state_dict=state_dict)
    model.config.use_cache = False
    if any(parameter.dtype == torch.float32 for parameter in model.parameters()):
        path = folder / "config.json"  # transformers notes the first weight's dtype, and would round the masters to it
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _load_adapter(
    folder: Path, tokenizer: PreTrainedTokenizerBase, device: str, dtype: torch.dtype, trust_remote_code: bool
) -> PeftModel:
    facts = json.loads((folder / BASE).read_text()) if (folder / BASE).exists() else {}
    config = PeftConfig.from_pretrained(str(folder))
    base = facts.get("base") or config.base_model_name_or_path
    section = Model(
        base=base,
        quantization=facts.get("quantization"),
        bnb_4bit_use_double_quant=facts.get("bnb_4bit_use_double_quant", True),
    )
    base_folder = hub.fetch(base, facts.get("revision") or config.revision)
    if facts and facts["base_hash"] != base_hash(base_folder):
        raise UsageError("R332", f"{folder} was trained on other base weights than those in {base_folder}")
    model = load_model(
        base_folder,
        device=device,
        dtype=dtype,
        quantization=quantization_config(section, dtype),
        trust_remote_code=trust_remote_code,
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the adapter brings the new rows
    return PeftModel.from_pretrained(model, str(folder))
