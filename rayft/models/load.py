"""Base weights, tokenizer and trained results in memory. Nothing else in rayft calls ``from_pretrained``."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from rayft.config.model import Model
from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.models import attention
from rayft.models.hub import kind_of
from rayft.models.quiet import quiet

DtypeName = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Origin:
    """Where base weights come from; ``load_base`` leaves it on the model as ``model.origin``."""

    base: str
    revision: str | None
    folder: str
    quantization: str | None
    double_quantization: bool


def dtype_of(recipe: Recipe, device: str) -> DtypeName:
    """The number format of the computation: ``model.dtype``, with ``auto`` decided for ``device`` (cpu, gpu, cuda:0).

    ``auto`` is bf16 where the device computes in bf16 (not where it only emulates it), else fp32.
    """
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bf16" if has_native_bf16(device) else "fp32"


def torch_dtype(name: str) -> torch.dtype:
    """bf16, fp16 or fp32 as PyTorch calls it."""
    return DTYPES[name]


def compute_context(dtype: str, device: str) -> AbstractContextManager[Any]:
    """The context of every forward pass of a model from `adapters.attach`: autocast to ``dtype``, nothing for fp32.

    Trainable weights are fp32 masters; here they are cast for each matmul, so that adapters compute in the base's
    number format. Without it a bf16 model with an adapter does not run.
    """
    if dtype == "fp32":
        return nullcontext()
    return torch.autocast("cpu" if device == "cpu" else "cuda", dtype=torch_dtype(dtype))


def has_native_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices itself, not by way of fp32."""
    if device == "cpu":
        return not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _cpu_flags() -> frozenset[str]:
    """Instruction sets of this machine's CPU, as Linux names them; empty elsewhere."""
    if not os.path.exists("/proc/cpuinfo"):
        return frozenset()
    with open("/proc/cpuinfo") as file:
        lines = (line.split(":", 1) for line in file if line.startswith(("flags", "Features")))
        return frozenset(next((line[1].split() for line in lines), []))


def load_tokenizer(recipe: Recipe, folder: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the recipe's chat template and added tokens.

    A tokenizer without a padding token gets its unknown token, or else its end token: padding is masked by attention
    and by loss weights, never by comparing ids, so the choice changes no number.

    Raises:
        UsageError: R310 (chat template), R311 (an added token is in the vocabulary already), R316 (files).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:  # tokenizers raises nothing finer
        raise UsageError("R316", f"model.base: cannot load the tokenizer of {folder}: {error}") from error
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = _chat_template(recipe.data.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    known = set(tokenizer.get_vocab()).intersection(recipe.model.add_tokens)
    if known:
        names = ", ".join(sorted(known))
        raise UsageError("R311", f"model.add_tokens: in the vocabulary already: {names}", "remove them from the list")
    tokenizer.add_tokens(recipe.model.add_tokens)
    return tokenizer


def _chat_template(value: str) -> str:
    """The template itself, from a file or as written; checked for syntax."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    if "{" not in value:
        if not os.path.isfile(value):
            raise UsageError("R310", f"data.chat_template: {value} is neither a file nor a Jinja template")
        with open(value, encoding="utf-8") as file:
            value = file.read()
    try:
        render_jinja_template(conversations=[], chat_template=value)  # compiles it with transformers' extensions
    except TemplateSyntaxError as error:
        raise UsageError("R310", f"data.chat_template: line {error.lineno}: {error.message}") from error
    return value


def load_base(recipe: Recipe, folder: str, device: str = "cpu") -> PreTrainedModel:
    """The base model of a recipe on ``device``, ready for `adapters.attach`.

    The weights are in the number format of the computation under an adapter (quantised if the recipe says so), and in
    fp32 where they are trained themselves, so that no digit of the checkpoint is lost on the way to the masters.

    Raises:
        UsageError: R312 (attention), R313 (quantisation), R314 (Liger), R315 (remote code), R316 (damaged files).
    """
    dtype = torch_dtype(dtype_of(recipe, device))
    storage = dtype if recipe.scale.strategy in ("zero3", "fsdp") else torch.uint8  # sharded tensors share one dtype
    model = load_model(
        folder,
        device=device,
        dtype=dtype if recipe.adapter else torch.float32,
        attention=_attention(recipe.model.attn_implementation, device, dtype),
        quantization=quantization_config(recipe.model, dtype, storage),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    model.origin = Origin(
        folder if kind_of(recipe.model.base) == "run" else recipe.model.base,
        recipe.model.revision,
        folder,
        recipe.model.quantization,
        recipe.model.bnb_4bit_use_double_quant,
    )
    if attention.wanted(recipe):
        attention.install(model)
    model.config.use_cache = False
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.use_liger_kernel:
        _use_liger(model, device)
    if device != "cpu":
        torch.set_float32_matmul_precision("high" if recipe.train.tf32 else "highest")
    return model


def load_model(
    folder: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model from a folder, complete and on ``device``.

    Raises:
        UsageError: R313 (quantisation), R315 (remote code), R316 (damaged or missing weights).
    """
    placed = (quantization is not None or device != "cpu") and not is_deepspeed_zero3_enabled()
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                quantization_config=quantization,
                device_map={"": device} if placed else None,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except ImportError as error:
        raise UsageError("R313", f"model.quantization: {error}", "pip install bitsandbytes") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            hint = "read that code, then set model.trust_remote_code=true"
            raise UsageError("R315", f"model.base: {folder} brings its own Python code", hint) from error
        raise UsageError("R316", f"model.base: cannot load {folder}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise UsageError("R316", f"model.base: {folder} has no weights for {', '.join(missing[:5])}")
    if quantization is not None:
        keep_trainable_on_cpu(model)
    return cast(PreTrainedModel, model)


def quantization_config(
    section: Model, dtype: torch.dtype, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | None:
    """bitsandbytes' config for ``model.quantization``: compute in ``dtype``, pack 4-bit values in ``storage``."""
    if section.quantization is None:
        return None
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantization,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def keep_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512-BF16 inference.

    The first forward pass in evaluation mode would repack them for good; from then on the layer passes no gradient to
    its input, and the layers below stop training without a word.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _attention(wanted: str, device: str, dtype: torch.dtype) -> str | None:
    """The kernel to ask transformers for; None lets it take sdpa, or eager where a model has no sdpa."""
    if wanted == "auto":
        half = dtype != torch.float32
        return "flash_attention_2" if device != "cpu" and half and is_flash_attn_2_available() else None
    if wanted == "flash_attention_2" and not (device != "cpu" and is_flash_attn_2_available()):
        raise UsageError(
            "R312",
            "model.attn_implementation: flash_attention_2 needs a GPU and the package flash-attn",
            "set model.attn_implementation=sdpa, which is exact as well",
        )
    return wanted


def _use_liger(model: PreTrainedModel, device: str) -> None:
    """Liger's kernels for norms, rotary embeddings and the MLP; not its loss, which knows no loss weights."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        hint = "pip install liger-kernel, or set train.use_liger_kernel=false"
        raise UsageError("R314", "train.use_liger_kernel: liger-kernel is not installed", hint) from error
    if device == "cpu":
        raise UsageError("R314", "train.use_liger_kernel: its Triton kernels need a GPU", "set it to false")
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
