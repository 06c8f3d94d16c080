"""`rayft chat` through a pipe, with an adapter that lies in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rayft.cli import app


@pytest.fixture(scope="module")
def adapter(tiny_model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "orders"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def chat(*words: Any, input: str = "") -> Any:
    return CliRunner().invoke(app, ["chat", *map(str, words), "--tokens", "6"], input=input)


def test_a_chat_through_a_pipe(adapter: Path) -> None:
    result = chat(adapter, "model.dtype=fp32", "--system", "Be brief.", input="Hello\n/temperature 1\nAgain\n")
    assert result.exit_code == 0, result.output
    lines = [line.partition(": ")[0] for line in result.output.splitlines()]
    assert [line for line in lines if line == "orders"] == ["orders"] * 2
    assert sum("(base)" in line for line in lines) == 2
    assert "temperature 1" in result.output


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    result = chat(tmp_path)
    assert result.exit_code == 2 and "R414" in result.output
    assert chat("model.base=nowhere", "--temperature", "-1").exit_code == 2
