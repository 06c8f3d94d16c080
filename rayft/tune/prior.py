"""A space for a recipe that names none, from "LoRA Without Regret" (Schulman and Thinking Machines, 2025)."""

from __future__ import annotations

from rayft.config.recipe import Recipe
from rayft.config.tune import Distribution
from rayft.tune.space import Values

EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""How fast the best rate falls with the hidden size, by family (get_lr of Tinker's cookbook)."""
RANKS = (4, 8, 16, 32, 64, 128)
BITS_PER_PARAMETER = 2.0
"""What a trained parameter can store (Allen-Zhu and Li, arXiv 2404.05405); a token of text holds about one bit."""


def learning_rate(hidden_size: int, model_type: str, *, lora: bool = True) -> float:
    """The expected best learning rate: 5e-5 * 10 (with LoRA) * (2000 / hidden_size) ** exponent.

    Other families than Llama and Qwen have an exponent of 0, the rate of a hidden size of 2000.
    """
    exponent = next((value for name, value in EXPONENTS.items() if model_type.startswith(name)), 0.0)
    return 5e-5 * (10 if lora else 1) * (2000 / hidden_size) ** exponent


def default_space(
    recipe: Recipe,
    hidden_size: int,
    model_type: str,
    *,
    tokens: int | None = None,
    parameters_per_rank: int | None = None,
) -> tuple[dict[str, Distribution], Values]:
    """(space, prior): what is searched where the recipe names nothing, and the point to try first.

    The learning rate lies within a factor of 8 of its prior. For LoRA also rank, target modules and dropout; `alpha`
    stays, since alpha and rate act alike. tokens: supervised tokens of one epoch; with parameters_per_rank (trained
    values of rank 1) ranks beyond the first that can store them all are left out.
    """
    adapter = recipe.adapter
    rate = learning_rate(hidden_size, model_type, lora=adapter is not None)
    space = {"train.learning_rate": Distribution(loguniform=[rate / 8, rate * 8])}
    prior: Values = {"train.learning_rate": rate}
    if adapter is None or adapter.method != "lora":
        return space, prior
    ranks = list(RANKS)
    if tokens and parameters_per_rank:
        enough = [rank for rank in ranks if rank * parameters_per_rank * BITS_PER_PARAMETER >= tokens]
        ranks = [rank for rank in ranks if rank <= max(enough[0], 16)] if enough else ranks
    space["adapter.rank"] = Distribution(choice=ranks)
    space["adapter.target_modules"] = Distribution(choice=["attention", "mlp", "all-linear"])
    space["adapter.dropout"] = Distribution(choice=[0.0, 0.05, 0.1])
    rank = 32 if 32 in ranks else ranks[-1]
    return space, prior | {"adapter.rank": rank, "adapter.target_modules": "all-linear", "adapter.dropout": 0.0}
