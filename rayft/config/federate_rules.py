"""Which settings of the section ``federate`` exclude each other, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayft.config.federate import Federate


def why_not(federate: Federate) -> str | None:
    """The first reason why these settings cannot be had together; None when they can."""
    return next((reason for applies, reason in RULES if applies(federate)), None)


def _replaces(f: Federate) -> bool:
    from rayft.config.federate import REPLACED

    return f.method in REPLACED


def _on_factors(f: Federate) -> bool:
    """Strategies that work on the factors themselves."""
    return f.strategy not in ("fedavg", "fedprox")


def _ranked(f: Federate) -> bool:
    from rayft.config.federate import RANKED

    return f.method in RANKED


def _robust(f: Federate) -> bool:
    from rayft.config.federate import ROBUST

    return f.strategy in ROBUST


Rule = tuple[Callable[["Federate"], bool], str]

RULES: tuple[Rule, ...] = (
    (
        lambda f: f.local_steps is not None and f.local_epochs is not None,
        "give local_steps or local_epochs, not both",
    ),
    (
        lambda f: bool(f.pinned) and f.partition.method != "sources",
        "pinned says where a source lies, and each source is a client then: partition: {method: sources}",
    ),
    (
        lambda f: len({name for pin in f.pinned for name in pin.sources}) < sum(len(pin.sources) for pin in f.pinned),
        "a source is pinned twice",
    ),
    (
        lambda f: bool(f.pinned) and f.strategy == "fedbuff",
        "fedbuff gives the next client to whichever worker is free, and pinned clients have one worker each",
    ),
    (
        lambda f: _on_factors(f) and _replaces(f),
        "this strategy keeps a state of the server in the space of the factors, and svd, fedex, flora and hetlora put"
        " other factors in their place every round; use aggregation: fedit, ffa, rolora or fedsa",
    ),
    (
        lambda f: f.strategy == "scaffold" and f.method == "rolora",
        "scaffold's control variates belong to weights that are trained every round, and rolora alternates them",
    ),
    (
        lambda f: f.strategy == "fedbuff" and f.method == "rolora",
        "rolora needs rounds in which all clients train the same factor, and fedbuff has none",
    ),
    (
        lambda f: len(set(f.ranks)) > 1 and not _ranked(f),
        "clients of different rank need aggregation: svd, flora or hetlora; the factors of the others have one shape",
    ),
    (
        lambda f: f.optimizer_state == "keep" and (_replaces(f) and f.method != "fedex"),
        "a kept optimiser state belongs to factors that svd, flora and hetlora replace every round",
    ),
    (
        lambda f: f.privacy is not None and f.weights == "examples",
        "with privacy clients count alike: a weight by examples would let one client move the sum by more than the"
        " clipping norm; leave weights at auto or uniform",
    ),
    (
        lambda f: f.privacy is not None and _replaces(f),
        "privacy adds noise to a sum of clipped changes, and svd, fedex, flora and hetlora need each client's own"
        " factors; use ffa, whose product is linear in what is trained (or rolora, fedit, fedsa)",
    ),
    (
        lambda f: f.privacy is not None and _robust(f),
        "the noise of privacy is calibrated to a sum, and median, trimmed_mean, krum and multi_krum take none",
    ),
    (
        lambda f: f.privacy is not None and f.strategy == "scaffold",
        "scaffold's control variates are a second, unprotected message of each client",
    ),
    (
        lambda f: f.privacy is not None and f.strategy == "fedbuff",
        "clients of fedbuff answer when they are ready, so no sampling protects them; privacy needs rounds",
    ),
    (
        lambda f: f.privacy is not None and f.cohort.over_selection > 0,
        "over-selection keeps the fastest clients, which is not the sampling that the accountant assumes",
    ),
    (
        lambda f: f.privacy is not None and f.privacy.adaptive and f.privacy.mode == "local",
        "the adaptive clipping norm is learnt from a noisy count of the server; mode: local has none",
    ),
    (
        lambda f: f.privacy is not None and f.privacy.adaptive and f.privacy.clip is None,
        "adaptive clipping starts from a clip, and clip is null",
    ),
    (
        lambda f: f.privacy is not None and f.privacy.clip is None and f.privacy.noise_multiplier > 0,
        "noise is measured in clipping norms, and clip is null",
    ),
    (
        lambda f: f.privacy is not None and f.privacy.mode == "local" and f.privacy.clip is None,
        "local privacy needs a clip",
    ),
    (
        lambda f: f.cohort.sampling == "poisson" and f.cohort.over_selection > 0,
        "over-selection asks more clients than a fixed number; poisson sampling has no fixed number",
    ),
    (
        lambda f: f.strategy == "fedbuff" and (f.cohort.sampling == "poisson" or f.cohort.over_selection > 0),
        "fedbuff has no rounds to sample for: it keeps `concurrency` clients at work",
    ),
    (
        lambda f: f.bias_correction == "flwr" and f.strategy not in ("fedadam", "fedyogi", "fedadagrad"),
        "bias_correction belongs to fedadam, fedyogi and fedadagrad",
    ),
    (
        lambda f: f.selected is not None and f.strategy != "multi_krum",
        "selected belongs to multi_krum",
    ),
)
