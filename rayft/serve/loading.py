"""From a plan to a replica in this process."""

from __future__ import annotations

from rayft.config.serve import Serve
from rayft.inference.settings import EngineSettings
from rayft.models import hub, load
from rayft.serve.plan import Plan
from rayft.serve.replica import Limits, Replica


def replica(plan: Plan, device: str, id: str = "0") -> Replica:
    """Load the base and start an engine on it. device: cpu or gpu.

    Raises:
        UsageError: R3xx of the base, R814 for an architecture that the engine cannot compute exactly.
    """
    recipe = plan.recipe
    where = "cuda" if device == "gpu" else "cpu"
    folder = hub.fetch(plan.base, recipe.model.revision)
    dtype = load.torch_dtype(load.dtype_of(recipe, where))
    model = load.load_model(
        folder,
        device=where,
        dtype=dtype,
        quantization=load.quantization_config(recipe.model, dtype),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return Replica(
        model,
        load.load_tokenizer(recipe, folder),
        plan.base_name,
        base_hash=plan.base_hash,
        quantization=recipe.model.quantization,
        settings=engine_settings(recipe.serve),
        limits=Limits(recipe.serve.host_cache, recipe.serve.max_lora_rank, recipe.serve.max_prompt_tokens),
        id=id,
    )


def engine_settings(serve: Serve) -> EngineSettings:
    """The keys of the recipe that are the engine's."""
    names = EngineSettings.__dataclass_fields__
    return EngineSettings(**{name: getattr(serve, name) for name in names})
