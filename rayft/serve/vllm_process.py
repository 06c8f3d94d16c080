"""A vLLM server as a child of this process: started from the recipe, ended with it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rayft.config.serve import Serve
from rayft.errors import RunFailed, UsageError
from rayft.serve.vllm_adapters import rank_flag
from rayft.serve.vllm_client import VllmClient

PATIENCE = 900.0
"""Seconds until vLLM must answer: large models and compilation take their time."""
LEAST_RANK = 16
FEW_LORAS = 8

_GUARD = """
import os, select, signal, subprocess, sys
if os.fork():
    os.wait()
    sys.exit()
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
while child.poll() is None and not select.select([0], [], [], 0.5)[0]:
    pass
child.terminate()
try:
    child.wait(float(sys.argv[1]))
except subprocess.TimeoutExpired:
    pass
os.killpg(0, signal.SIGKILL)
"""
"""Runs a command until its standard input is closed, which happens when the process at the other end dies, however that
dies; then it ends all that the command has started. It forks because Ray kills the children of a worker that ends, and
would leave vLLM's own children alone."""


class VllmProcess:
    """Start it, `wait` for it, and `close` it."""

    def __init__(
        self, command: list[str], url: str, log: Path, environment: Mapping[str, str], grace: float = 15
    ) -> None:
        """grace: seconds that it has to end by itself."""
        self.url, self.log, self.grace = url, log, grace
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-c", _GUARD, str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    async def wait(self, patience: float = PATIENCE) -> None:
        """Until it answers. Raises RunFailed R864 with what it said last."""
        client, until = VllmClient(self.url), time.monotonic() + patience
        try:
            while not await client.healthy():
                if not self.alive or time.monotonic() > until:
                    why = "ended" if not self.alive else f"did not answer within {patience:.0f} s"
                    raise RunFailed("R864", f"vLLM {why}: {self._last_words()}", f"its output: {self.log}")
                await asyncio.sleep(0.2)
        finally:
            await client.close()

    def close(self) -> None:
        """End it and everything that it has started."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            self._guard.wait(self.grace + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1].strip()[-300:]


def command(
    serve: Serve, model: str, name: str, port: int, *, dtype: str, rank: int, more: Mapping[str, object]
) -> list[str]:
    """What starts vLLM for a recipe. model: folder of the base. dtype: as torch names it. rank: largest among the
    adapters that are served from the start. more: flags that are not in the recipe, by name; None = leave out.

    Raises:
        UsageError: R867, vLLM is not there; R866, `serve.max_lora_rank` is beyond what it takes.
    """
    flags: dict[str, object] = {
        "served_model_name": name,
        "host": "127.0.0.1",
        "port": port,
        "dtype": dtype,
        "max_model_len": serve.max_model_len,
        "max_num_seqs": serve.max_num_seqs,
        "max_num_batched_tokens": serve.max_num_batched_tokens,
        "enable_prefix_caching": serve.enable_prefix_caching,
        "enable_lora": True,
        "max_loras": most_loras(serve) + 1,  # one for the base, where it answers through an adapter
        "max_cpu_loras": 4 * (most_loras(serve) + 1),
        "max_lora_rank": largest_rank(serve, rank),
        "scheduling_policy": "priority",
        "structured_outputs_config": '{"backend": "guidance"}',
        "enable_prompt_tokens_details": True,
        **more,
        **_options(serve),
    }
    return [*program(serve, model), *(word for name, value in flags.items() for word in _flag(name, value))]


def most_loras(serve: Serve) -> int:
    """vLLM sets memory aside for `max_loras` adapters of `max_lora_rank`, whether they come or not: so the defaults,
    which cost rayft's engine nothing, do not count here."""
    said = _options(serve).get("max_loras")
    if said is not None:
        return int(said) - 1
    return serve.max_loras if serve.max_loras != Serve().max_loras else FEW_LORAS


def largest_rank(serve: Serve, rank: int) -> int:
    """A rank that vLLM takes. rank: largest among the adapters of the start. Raises UsageError R866."""
    said = _options(serve).get("max_lora_rank")
    if said is not None:
        return int(said)
    return rank_flag(serve.max_lora_rank if serve.max_lora_rank != Serve().max_lora_rank else max(rank, LEAST_RANK))


def _options(serve: Serve) -> dict[str, str | int | float | bool | None]:
    """`vllm_args` with the names that Python has for options."""
    return {name.replace("-", "_"): value for name, value in serve.vllm_args.items()}


def environment(threads: int | None) -> dict[str, str]:
    """Of the child: this process's, without what belongs to this interpreter."""
    mine = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    mine |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    if threads is not None:  # several replicas on a machine would bind to the same cores
        mine |= {"OMP_NUM_THREADS": str(threads)}
        mine.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return mine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(serve: Serve, model: str) -> list[str]:
    """What starts vLLM, without options. Raises UsageError R867 where it is not there."""
    if serve.vllm_python is None:
        if (found := shutil.which("vllm")) is None:
            raise UsageError("R867", "vLLM is not installed: there is no `vllm` on PATH", "serve.vllm_python=PATH")
        return [found, "serve", model]
    if (python := shutil.which(os.path.expanduser(serve.vllm_python))) is None:
        raise UsageError("R867", f"serve.vllm_python: {serve.vllm_python} is no program")
    # `vllm serve` by another way, which builds for CPUs know too: some have no package of the name `vllm`.
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def _flag(name: str, value: object) -> list[str]:
    word = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    return [f"--{word}", str(value)]
