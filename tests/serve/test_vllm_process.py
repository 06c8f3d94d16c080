"""vLLM as a child process: the command that starts it, what it says when it ends, and that it never stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rayft.config.serve import Serve
from rayft.errors import RunFailed, UsageError
from rayft.serve.driver import check_vllm
from rayft.serve.plan import plan
from rayft.serve.vllm_process import VllmProcess, command, largest_rank, most_loras


def test_the_command_follows_the_recipe() -> None:
    serve = Serve(
        vllm_python=sys.executable, max_model_len=512, vllm_args={"gpu-memory-utilization": 0.5, "dtype": None}
    )
    words = command(serve, "/base", "tiny", 9, dtype="bfloat16", rank=20, more={"trust_remote_code": None})
    line = " ".join(words)
    assert "--model /base" in line and "--max-model-len 512" in line and "--max-lora-rank 32" in line
    assert "--gpu-memory-utilization 0.5" in line and "--dtype" not in line and "--enable-prefix-caching" in line
    assert "--max-loras 9" in line and "trust" not in line
    said = Serve(vllm_python=sys.executable, max_loras=3, max_lora_rank=100, enable_prefix_caching=False)
    line = " ".join(command(said, "/base", "tiny", 9, dtype="float32", rank=1, more={}))
    assert "--max-loras 4" in line and "--max-lora-rank 128" in line and "--no-enable-prefix-caching" in line
    own = Serve(vllm_python=sys.executable, vllm_args={"max-lora-rank": 64, "max_loras": 5})
    assert (largest_rank(own, 1), most_loras(own)) == (64, 4)
    with pytest.raises(UsageError, match="R866"):
        command(Serve(vllm_python=sys.executable, max_lora_rank=513), "/", "t", 9, dtype="float32", rank=1, more={})
    with pytest.raises(UsageError, match="R867"):
        command(Serve(vllm_python="/nowhere/python"), "/", "t", 9, dtype="float32", rank=1, more={})


def test_a_server_says_before_it_starts_that_vllm_is_not_there(tiny_model_folder: str, tmp_path: Path) -> None:
    words = [f"model.base={tiny_model_folder}", f"storage={tmp_path}", "serve.port=0"]
    with pytest.raises(UsageError, match="R867"):
        check_vllm(plan([], [*words, "serve.backend=vllm", "serve.vllm_python=/nowhere/python"]))
    for url in ("http://127.0.0.1:9/v1", "no address"):
        with pytest.raises(UsageError, match="R867"):
            check_vllm(replace(plan([], words), attach=url))
    check_vllm(plan([], words))


def test_a_vllm_that_ends_says_why(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise ValueError('no such flag')"]
    process = VllmProcess(words, "http://127.0.0.1:9", tmp_path / "vllm.log", os.environ)
    with pytest.raises(RunFailed, match=r"R864.*no such flag"):
        asyncio.run(process.wait(30))
    process.close()


@pytest.mark.parametrize("guard_too", [False, True])
def test_vllm_ends_with_the_process_that_started_it(tmp_path: Path, guard_too: bool) -> None:
    """And so does what it has started, when Ray kills the children of that process too."""
    asleep = "import time; time.sleep(600)"
    vllm = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {asleep!r}]); {asleep}"
    code = (
        "import os, sys; from pathlib import Path; from rayft.serve.vllm_process import VllmProcess\n"
        f"p = VllmProcess([sys.executable, '-c', {vllm!r}], 'http://x', Path({str(tmp_path)!r}, 'log'), os.environ)\n"
        f"print(p._guard.pid, flush=True)\n{asleep}"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    guard = psutil.Process(int(parent.stdout.readline()))
    wait_for(lambda: len(guard.children(recursive=True)) == 3)  # itself once more, vLLM, and what that started
    started = guard.children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    if guard_too:
        guard.kill()
    parent.wait()
    wait_for(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started))


def wait_for(condition: Callable[[], bool], patience: float = 90) -> None:
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
