"""Names of optimisers and schedules. They are transformers' own; a test holds both lists equal to the library's.

Written down here, so that a wrong name costs a second and not the start of a cluster.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

OPTIMISERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit"),
    *("adamw_torch_8bit", "adamw_8bit", "adamw_bnb_8bit", "adamw_anyprecision", "paged_adamw_32bit"),
    *("paged_adamw_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit", "adafactor", "sgd", "adagrad"),
    *("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit"),
    *("galore_adafactor", "apollo_adamw", "grokadamw", "stable_adamw"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
)

IN_BACKWARD = (
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise"),
    *("lomo", "adalomo"),
)
"""Optimisers that step inside the backward pass, before the gradient of the global batch is complete."""

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy"),
)


def require(given: str, known: Sequence[str]) -> str:
    """The given name. Raises ValueError with the nearest names, or all of them."""
    if given in known:
        return given
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    raise ValueError(f"did you mean {', '.join(near)}?" if near else f"allowed are {', '.join(known)}")
