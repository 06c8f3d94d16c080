"""A GGUF file becomes a model folder that every library reads."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

from rayft.errors import UsageError
from rayft.models.quiet import quiet


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file and save it as bf16 safetensors with its tokenizer and chat template.

    bf16, not fp32: the published weights of current models are bf16, a GGUF's own rounding (4 to 8 bits) is far
    coarser than bf16's, and workers map half as many bytes. The folder's weights are the base from then on: what is
    trained, scored and served starts from the same numbers.

    Raises:
        UsageError: R306, when the file is damaged or its architecture is not supported by transformers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dense = GgufConfig(dequantize=True)
    with quiet():
        try:
            with redirect_stderr(io.StringIO()):  # the reader's own progress bar cannot be switched off
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.bfloat16
                )
        except Exception as error:  # a damaged file ends anywhere in three readers, one of which raises nothing finer
            hint = "give model.base a folder in Hugging Face layout"
            raise UsageError("R306", f"model.base: cannot read {gguf}: {error}", hint) from error
        # save_pretrained takes the model for a quantised one as long as one of these remembers the GGUF file.
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
