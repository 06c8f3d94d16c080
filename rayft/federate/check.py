"""What a federation cannot do with a recipe, found out before anything starts."""

from __future__ import annotations

from importlib.util import find_spec

from rayft.config.federate import Federate
from rayft.config.recipe import Recipe
from rayft.errors import UsageError


def check(recipe: Recipe, federate: Federate) -> None:
    """Raises UsageError R902 for a recipe that cannot be federated as it stands, R904 where a package is missing."""
    if reason := why_not(recipe, federate):
        raise UsageError("R902", f"this recipe cannot be federated: {reason[0]}", reason[1])
    if federate.pinned:
        from rayft.federate.sites import sites_of

        sites_of(recipe, federate)
    if federate.privacy is not None and find_spec("dp_accounting") is None:
        raise UsageError("R904", "federate.privacy needs the package dp-accounting", "pip install 'rayft[federate]'")


def why_not(recipe: Recipe, federate: Federate) -> tuple[str, str] | None:
    """(reason, what to do) of the first obstacle."""
    if trains_alone(recipe) and (found := _not_alone(recipe, federate)):
        return found
    if recipe.data.packing:
        return "data.packing mixes the examples of several clients in one bin", "data.packing=false"
    if federate.ranks and recipe.adapter is not None and max(federate.ranks) > recipe.adapter.rank:
        return (
            f"a client has rank {max(federate.ranks)}, and adapter.rank, the server's, is {recipe.adapter.rank}",
            f"adapter.rank={max(federate.ranks)}",
        )
    if federate.ranks and recipe.adapter is not None and recipe.adapter.peft_args.get("rank_pattern"):
        return "federate.ranks and adapter.peft_args.rank_pattern both set ranks", "leave one of them out"
    if federate.pinned and isinstance(recipe.data.validation, float):
        return (
            "data.validation is a fraction of the clients' rows, and pinned rows do not leave their nodes",
            "validation sources of their own, and federate.evaluate.holdout for a share of each client's rows",
        )
    if federate.pinned and recipe.scale.workers == 0:
        return (
            "scale.workers=0 is one process, and federate.pinned says on which nodes of a cluster",
            "scale.workers=auto",
        )
    if federate.strategy == "scaffold":
        return _not_plain_sgd(recipe)
    return None


def trains_alone(recipe: Recipe) -> str | None:
    """Why clients train one at a time: no adapter, or one that cannot share a pack. None: they train in packs."""
    from rayft.multilora.suits import why_not as not_in_a_pack

    return not_in_a_pack(recipe)


ALONE: tuple[tuple[str, tuple[object, ...], str, str], ...] = (
    ("scale.strategy", ("zero1", "zero2", "zero3", "fsdp"), "a client is trained whole on one worker", "ddp"),
    ("model.dtype", ("fp16",), "each client would look for its loss scale anew", "bf16"),
    ("adapter.method", ("adalora",), "each client would move its ranks elsewhere", "lora"),
    ("train.torch_compile", (True,), "each client would be compiled anew", "false"),
    ("train.lr_scheduler_type", ("reduce_lr_on_plateau", "greedy"), "this schedule looks at evaluations", "constant"),
    ("train.load_best_model_at_end", (True,), "a client has no checkpoints to go back to", "false"),
    ("train.on_divergence", ("rollback",), "a client has no checkpoints to go back to", "stop"),
)
"""(key, values, why clients cannot train alone with them, what can be had instead)."""


def _not_alone(recipe: Recipe, federate: Federate) -> tuple[str, str] | None:
    plain = recipe.model_dump(mode="json")
    for key, values, reason, instead in ALONE:
        section, name = key.split(".")
        if (plain[section] or {}).get(name) in values:
            return f"{key}={plain[section][name]}: {reason}", f"{key}={instead}"
    if isinstance(recipe.train.trainable, list):
        return "train.trainable has phases, which are those of one run from start to end", "one set of weights"
    if recipe.train.l2_sp:
        return "train.l2_sp pulls to the start of a run", "federate.strategy=fedprox pulls to that of the round"
    if recipe.train.early_stopping_patience is not None:
        return "train.early_stopping_patience looks at evaluations, and a client has none", "leave it out"
    if "lomo" in recipe.train.optim:
        return f"train.optim={recipe.train.optim} steps inside the backward pass", "train.optim=adafactor"
    if federate.aggregation not in ("auto", "fedit"):
        return (
            f"federate.aggregation={federate.aggregation} puts the factors of plain LoRA adapters together, and here "
            f"tensors are averaged one by one ({trains_alone(recipe)})",
            "federate.aggregation=fedit (or auto)",
        )
    if federate.ranks:
        return "federate.ranks are those of plain LoRA adapters", "leave it out"
    return None


def _not_plain_sgd(recipe: Recipe) -> tuple[str, str] | None:
    """SCAFFOLD's control variates are mean gradients, (w_t - y) / (K rate), only when each step is one."""
    train = recipe.train
    wanted = {
        "train.optim": (train.optim, "sgd"),
        "train.optim_args": (train.optim_args, None),
        "train.weight_decay": (train.weight_decay, 0.0),
        "train.max_grad_norm": (train.max_grad_norm, 0.0),
    }
    for key, (given, needed) in wanted.items():
        if given != needed:
            shown = "null" if needed is None else needed
            return (
                f"scaffold's control variates are gradients only under plain SGD, and {key} is {given}",
                f"{key}={shown}",
            )
    if recipe.adapter is not None and recipe.adapter.loraplus_lr_ratio is not None:
        return "scaffold needs one learning rate, and adapter.loraplus_lr_ratio gives two", "leave it out"
    return None
