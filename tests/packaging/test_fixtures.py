"""The shared fixtures and the ledger of slow tests do what the other tests rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def test_tiny_model_is_a_stock_checkpoint_with_a_chat_template(tiny_model_folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert model.config.num_hidden_layers == 4 and model.config.vocab_size == len(tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|pad|>")
    chat = [{"role": "user", "content": "Grüße\n 12"}, {"role": "assistant", "content": "Paris."}]
    text = "<|im_start|>user\nGrüße\n 12<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def run_pytest(pytester: pytest.Pytester, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True)


@pytest.mark.long
def test_slow_ledger_names_what_it_left_out_and_fails_until_it_has_passed(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    ledger = tmp_path / "slow.json"
    folder = Path(__file__).parents[1]
    pytester.makeini("[pytest]\nmarkers =\n  slow: x\n  gpu: x\n")
    pytester.makeconftest(
        f"""
        import sys, os, pathlib
        sys.path.insert(0, {str(folder)!r})
        import slow_ledger
        def pytest_configure(config):
            plugin = slow_ledger.SlowLedger(os.environ["MODE"], pathlib.Path({str(ledger)!r}))
            config.pluginmanager.register(plugin, "ledger")
        """
    )
    pytester.makepyfile(
        """
        import os, pytest
        def test_fast(): pass
        @pytest.mark.slow
        @pytest.mark.xdist_group("some")
        def test_long(): assert os.environ.get("BROKEN") != "1"
        """
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MODE", "check")
        unproven = run_pytest(pytester, "-m", "not slow")
        assert unproven.returncode == 1 and "NEVER PASSED" in unproven.stdout and "test_long" in unproven.stdout
        assert run_pytest(pytester, "-m", "not slow", "-n", "2").returncode == 1, "in two processes as well"

        environment.setenv("MODE", "record")
        environment.setenv("BROKEN", "1")
        assert run_pytest(pytester, "-m", "slow").returncode == 1
        environment.setenv("MODE", "check")
        assert run_pytest(pytester, "-m", "not slow").returncode == 1, "a failure on record is no proof"

        environment.setenv("MODE", "record")
        environment.delenv("BROKEN")
        assert run_pytest(pytester, "-m", "slow").returncode == 0
        (entry,) = json.loads(ledger.read_text()).values()
        assert entry["outcome"] == "passed" and entry["commit"] and entry["seconds"] >= 0
        environment.setenv("MODE", "check")
        for processes in ([], ["-n", "2", "--dist", "loadgroup"]):
            proven = run_pytest(pytester, "-m", "not slow", *processes)
            assert proven.returncode == 0 and "passed at" in proven.stdout and "test_long" in proven.stdout
