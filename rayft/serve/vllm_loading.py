"""From a plan to a vLLM backend: one that is started here, or one that runs already."""

from __future__ import annotations

import json
from pathlib import Path

from rayft.errors import RunFailed, UsageError
from rayft.models import hub, load
from rayft.runs.registry import Registry
from rayft.serve.plan import Plan
from rayft.serve.vllm_backend import Facts, VllmBackend, VllmLimits
from rayft.serve.vllm_process import VllmProcess, command, environment, free_port, largest_rank, most_loras
from rayft.serve.vllm_zero import skeleton, zero_adapter

ZERO = "zero-adapter"
"""Folder, in the server's; each replica writes one of its own."""


class VllmReplica(VllmBackend):
    """A `VllmBackend` whose server is a child of this process."""

    process: VllmProcess

    async def close(self) -> None:
        await super().close()
        self.process.close()

    def check(self) -> None:
        """Raises RunFailed R839 when vLLM has ended."""
        if not self.process.alive:
            raise RunFailed("R839", "vLLM has ended", f"its output: {self.process.log}")


async def vllm_replica(plan: Plan, device: str, threads: int | None, id: str = "0") -> VllmReplica:
    """Start vLLM and wait until it answers. device: cpu or gpu. threads: computing threads; None leaves them.

    Raises:
        UsageError: R3xx of the base, R866 and R867. RunFailed: R864, vLLM did not start.
    """
    recipe, serve = plan.recipe, plan.recipe.serve
    if recipe.model.quantization is not None and "quantization" not in serve.vllm_args:
        raise UsageError("R866", "vLLM quantises in its own ways", "serve.vllm_args: {quantization: ...}, or none")
    folder = hub.fetch(plan.base, recipe.model.revision)
    dtype = load.dtype_of(recipe, "cuda" if device == "gpu" else "cpu")
    model = skeleton(folder, recipe.model.trust_remote_code)
    rank, port = _largest_rank(plan), free_port()
    words = command(
        serve,
        folder,
        plan.base_name,
        port,
        dtype=str(load.torch_dtype(dtype)).removeprefix("torch."),
        rank=rank,
        more={"trust_remote_code": recipe.model.trust_remote_code or None},
    )
    process = VllmProcess(words, f"http://127.0.0.1:{port}", Path(plan.folder, f"vllm-{id}.log"), environment(threads))
    try:
        await process.wait()
    except BaseException:
        process.close()
        raise
    replica = VllmReplica(
        process.url,
        load.load_tokenizer(recipe, folder),
        _facts(plan, model, dtype),
        zero=zero_adapter(model, Path(plan.folder, f"{ZERO}-{id}")) if device == "cpu" else None,
        limits=VllmLimits(
            serve.max_prompt_tokens, serve.max_queued_tokens, largest_rank(serve, rank), most_loras(serve)
        ),
        id=id,
    )
    replica.process = process
    return replica


def attached(plan: Plan, url: str) -> VllmBackend:
    """A vLLM that runs already. Nothing says whether it computes on CPUs, so the base answers through a zero adapter.

    Raises UsageError R3xx of the base.
    """
    recipe, serve = plan.recipe, plan.recipe.serve
    folder = hub.fetch(plan.base, recipe.model.revision)
    model = skeleton(folder, recipe.model.trust_remote_code)
    return VllmBackend(
        url,
        load.load_tokenizer(recipe, folder),
        _facts(plan, model, "unknown"),
        zero=zero_adapter(model, Path(plan.folder, ZERO)),
        limits=VllmLimits(serve.max_prompt_tokens, serve.max_queued_tokens),
    )


def _facts(plan: Plan, model: object, dtype: str) -> Facts:
    return Facts(
        name=plan.base_name,
        base_hash=plan.base_hash,
        architecture=type(model).__name__,
        dtype=dtype,
        quantization=plan.recipe.model.quantization,
        parameters=int(model.num_parameters()),  # type: ignore[attr-defined]
        vocabulary=int(model.config.get_text_config().vocab_size),  # type: ignore[attr-defined]
    )


def _largest_rank(plan: Plan) -> int:
    """Among all versions that the registry knows when the server starts."""
    ranks = [1]
    for alias in Registry(plan.registry).aliases().values():
        for version in alias.versions:
            config = json.loads(Path(version.path, "adapter_config.json").read_text())
            ranks += [int(config.get("r") or 1), *map(int, (config.get("rank_pattern") or {}).values())]
    return max(ranks)
