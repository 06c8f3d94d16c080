"""One answer to the question which content an adapter has: from its files without torch, and from its tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayft.runs.registry import Registry
from tests.runs.adapters import adapter_folder

NAME = "base_model.model.layers.{}.q_proj.lora_{}.weight"


def saved(folder: Path, dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """An adapter as PEFT itself writes it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    fields = {"r": 4, "target_modules": ["q_proj"], **config}
    LoraConfig(**fields).save_pretrained(str(folder))
    tensors = {
        NAME.format(layer, letter): torch.randn(shape, generator=draw).to(getattr(torch, dtype))
        for layer in (10, 9)
        for letter, shape in (("B", (6, 4)), ("A", (4, 5)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_files_and_tensors_have_the_same_hash(tmp_path: Path, dtype: str) -> None:
    from rayft.multilora.bank import AdapterState

    folder = saved(tmp_path / "a", dtype, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 2.5})
    version = Registry(tmp_path / "registry").register("bot", folder)
    assert version.hash == AdapterState.read(folder).content_hash() == AdapterState.read(version.path).content_hash()


def test_old_configs_that_lack_keys_have_pefts_defaults(tmp_path: Path) -> None:
    from rayft.multilora.bank import AdapterState

    full = saved(tmp_path / "a", lora_alpha=8, r=8)
    bare = saved(tmp_path / "b")
    (bare / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    registry = Registry(tmp_path / "registry")
    hashes = {registry.register("bot", folder, allow_same=True).hash for folder in (full, bare)}
    hashes |= {AdapterState.read(folder).content_hash() for folder in (full, bare)}
    assert len(hashes) == 1


def test_what_changes_the_hash(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    variants: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"lora_alpha": 16},
        {"lora_alpha": 0},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"fan_in_fan_out": True},
        {"use_dora": True},
        {"trainable_token_indices": [3, 4]},
        {"trainable_token_indices": [3, 5]},
    ]
    made = [registry.register("bot", saved(tmp_path / str(n), **fields)) for n, fields in enumerate(variants)]
    assert len({version.hash for version in made}) == len(variants)
    same = saved(tmp_path / "same", lora_dropout=0.5, base_model_name_or_path="elsewhere", inference_mode=True)
    assert registry.register("other", same).hash == made[0].hash


def test_the_registry_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    """The HTTP side of a server imports it."""
    folder = adapter_folder(tmp_path / "a", 1.0)
    code = (
        "import sys\nfrom rayft.runs.registry import Registry\n"
        f"Registry({str(tmp_path / 'registry')!r}).register('bot', {str(folder)!r})\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
