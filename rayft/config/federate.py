"""``federate:`` who the clients are, what they do in a round, and how their work becomes one adapter."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayft.config.choices import require
from rayft.config.presets import PRESETS, settings_of
from rayft.config.section import Section

STRATEGIES = (
    *("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "fedbuff"),
    *("median", "trimmed_mean", "krum", "multi_krum"),
)
SERVER_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum")
AGGREGATIONS = ("auto", "svd", "fedex", "flora", "fedit", "ffa", "rolora", "hetlora", "fedsa")
REPLACED = ("svd", "fedex", "flora", "hetlora")
"""Aggregations that need more than a sum of the clients' changes, or put other factors in the place of theirs."""
RANKED = ("svd", "flora", "hetlora")
"""Aggregations that take clients of different rank."""
SELECTOR = re.compile(r"!?(in\([\w.-]+(, ?[\w.-]+)*\)|[\w.-]+)")
"""A value of a label selector in Ray's syntax."""


class Partition(Section):
    method: Literal["sources", "natural", "iid", "dirichlet", "pathological", "quantity"] = "iid"
    """sources: each of `data.train` is a client. natural: each value of `column` is one. iid: equal random parts.
    dirichlet: shares of each class drawn as flwr-datasets does. pathological: `classes` classes per client.
    quantity: parts whose sizes are drawn from a Dirichlet distribution."""
    column: str = "source"
    """Column of the rows that holds the class or the client; `source`: the name of the source a row is from."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet distribution: small values make clients differ."""
    classes: int = Field(2, ge=1)
    """pathological: classes per client."""
    min_size: int = Field(1, ge=0)
    """Fewest examples of a client; the Dirichlet draw is repeated, ten times at most, until all have as many."""
    self_balancing: bool = False
    """dirichlet: a client that has its share already gets nothing more of a class."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Default: the recipe's `seed`."""


class Pin(Section):
    """A place where some clients' data lies, and is read."""

    sources: list[str] = Field(min_length=1)
    """Names of sources of `data.train` (`name`, else the file's name); each is a client."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of the node with the data, such as `{hospital_a: 1}`, which the worker there takes."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the node with the data, as Ray writes them: `{site: a}`, `"in(a, b)"`, `"!a"`."""

    @field_validator("resources")
    @classmethod
    def _custom_and_positive(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := [name for name, amount in value.items() if name in ("CPU", "GPU", "memory") or amount <= 0]:
            raise ValueError(f"{wrong[0]}: an amount above 0 of a custom resource; CPUs and GPUs are `scale`'s")
        return value

    @field_validator("label_selector")
    @classmethod
    def _as_ray_reads_it(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := [text for text in value.values() if not SELECTOR.fullmatch(text)]:
            raise ValueError(f"{wrong[0]!r} is no selector; one is `a`, `!a`, `in(a, b)` or `!in(a, b)`")
        return value

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        if not self.resources and not self.label_selector:
            raise ValueError("a pin needs resources or a label_selector, which say where")
        return self


class Cohort(Section):
    size: float = Field(1.0, gt=0)
    """Clients of a round: up to 1 a share of all, above a number."""
    sampling: Literal["fixed", "poisson"] = "fixed"
    """fixed: so many clients, drawn without replacement. poisson: each client by its own coin, with `size` expected."""
    over_selection: float = Field(0.0, ge=0)
    """Share of further clients that are asked, of which those that come last are left out."""
    deadline_s: float | None = Field(None, gt=0)
    """Seconds after which a round goes on without the clients that have not answered."""
    minimum: int = Field(1, ge=1)
    """Fewest clients whose work makes a round."""
    max_failed: float = Field(0.5, ge=0, le=1)
    """Share of a cohort that may fail, by an error or a broken answer, before the run fails."""


class Privacy(Section):
    """Client-level differential privacy (DP-FedAvg, arXiv 1710.06963)."""

    mode: Literal["central", "local"] = "central"
    """central: the server adds noise to the sum. local: each client adds noise before it answers."""
    noise_multiplier: float = Field(1.0, ge=0)
    """Standard deviation of the noise over the clipping norm."""
    clip: float | None = Field(0.1, gt=0)
    """L2 norm to which a client's whole change is clipped; null = not at all, which gives no privacy."""
    adaptive: bool = False
    """Let the clipping norm follow a quantile of the norms (arXiv 1905.03871)."""
    target_quantile: float = Field(0.5, gt=0, lt=1)
    """adaptive: share of clients that are not clipped."""
    clip_learning_rate: float = Field(0.2, gt=0)
    """adaptive: rate of the geometric update."""
    count_stddev: float | None = Field(None, gt=0)
    """adaptive: standard deviation of the noise on the count of clients. Default: a twentieth of the cohort."""
    epsilon: float | None = Field(None, gt=0)
    """Budget: the run ends before the release that would exceed it."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Default: 1 / clients^1.1."""
    noise_seed: int | None = Field(None, ge=0)
    """For tests only: noise that can be computed again protects nobody. Default: the system's secure generator."""


class FederatedEvaluation(Section):
    every: int = Field(1, ge=1)
    """Rounds between two evaluations; the last round is always evaluated."""
    central: bool = True
    """On `data.validation`, where the recipe has it."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of each client's examples that is kept from training to evaluate on; 0 = no federated evaluation."""
    clients: float = Field(1.0, gt=0)
    """Clients that evaluate: up to 1 a share of all, above a number."""


class Federate(Section):
    preset: Literal[
        "flowertune-general", "flowertune-finance", "flowertune-medical", "flowertune-code", "openfedllm"
    ] | None = None  # fmt: skip
    """Defaults that mirror a published setting; other keys go before it."""
    clients: int = Field(10, ge=1)
    """Number of clients that the data is split over; sources and natural have as many as they find."""
    partition: Partition = Partition()
    pinned: list[Pin] = Field(default_factory=list)
    """Nodes that some clients' data is on: it is read there, and only there, by a worker of that place. Needs
    `partition.method: sources`."""
    rounds: int = Field(20, ge=1)
    """Rounds of the whole run."""
    cohort: Cohort = Cohort()
    local_steps: int | None = Field(None, ge=1)
    """Optimiser steps of a client in a round."""
    local_epochs: float | None = Field(None, gt=0)
    """Passes of a client over its data in a round, instead of `local_steps`. Default: 1."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """keep: a client's optimiser goes on where it was when the client took part last."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How `train.learning_rate` changes over the rounds; within a round it is constant."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Where the schedule ends."""
    strategy: str = "fedavg"
    """fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, scaffold, fedbuff, median, trimmed_mean, krum or
    multi_krum."""
    aggregation: str = "auto"
    """How LoRA factors are put together: svd, fedex, flora, fedit, ffa, rolora, hetlora or fedsa. auto: svd, which is
    exact; ffa with `privacy`; fedit where the strategy works on the factors themselves."""
    residual: bool = True
    """svd: keep what the rank cannot hold in a frozen accumulator adapter, so that the sum stays exact."""
    accumulator_rank: int | None = Field(None, ge=1)
    """Truncate the accumulator to this rank; the error is reported. Default: exact."""
    ranks: list[int] = Field(default_factory=list)
    """Ranks of the clients, in turn, where they differ; `adapter.rank` is the server's."""
    weights: Literal["auto", "examples", "uniform"] = "auto"
    """auto: by examples; uniform with `privacy`."""
    mu: float = Field(0.01, ge=0)
    """fedprox: weight of the pull towards the round's start, mu / 2 * |w - w_t|^2."""
    server_learning_rate: float | None = Field(None, gt=0)
    """Default: 1; 0.1 with fedadam and fedadagrad, 0.01 with fedyogi."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """fedavgm: beta."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """fedadam, fedyogi."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """fedadam, fedyogi."""
    tau: float = Field(1e-3, gt=0)
    """fedadam, fedyogi, fedadagrad: added to the root of the second moment."""
    bias_correction: Literal["none", "flwr"] = "none"
    """fedadam, fedyogi, fedadagrad: as in arXiv 2003.00295, or as in Flower: the second moment starts at 0, and fedadam
    is corrected with exponents that begin at 2."""
    trim: float = Field(0.2, ge=0, lt=0.5)
    """trimmed_mean: share that is cut off at each end."""
    byzantine: int = Field(0, ge=0)
    """krum, multi_krum: clients that may be malicious."""
    selected: int | None = Field(None, ge=1)
    """multi_krum: clients that are averaged. Default: the cohort less `byzantine`."""
    buffer: int = Field(10, ge=1)
    """fedbuff: updates that make a new version."""
    concurrency: int | None = Field(None, ge=1)
    """fedbuff: clients at work at once. Default: the cohort."""
    max_staleness: int | None = Field(None, ge=0)
    """fedbuff: older updates are dropped."""
    privacy: Privacy | None = None
    """Absent: no differential privacy."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """Number format of messages; sums are fp64."""
    communication_budget_mb: float | None = Field(None, gt=0)
    """The run ends before the round that would exceed so many megabytes up and down."""
    pack_size: int = Field(8, ge=1)
    """Clients of a block, which train at once; part of the result's definition, whatever the number of actors."""
    evaluate: FederatedEvaluation = FederatedEvaluation()

    @property
    def method(self) -> str:
        """`aggregation` with auto decided."""
        if self.aggregation != "auto":
            return self.aggregation
        if self.privacy is not None:
            return "ffa"
        return "svd" if self.strategy in ("fedavg", "fedprox") else "fedit"

    @property
    def weighted(self) -> bool:
        """Whether clients count by their examples."""
        return self.weights == "examples" or (self.weights == "auto" and self.privacy is None)

    @property
    def server_rate(self) -> float:
        return self.server_learning_rate or {"fedadam": 0.1, "fedadagrad": 0.1, "fedyogi": 0.01}.get(self.strategy, 1.0)

    @property
    def label(self) -> str | None:
        """The column of the rows that the partition looks at, where it is not `source`."""
        uses = self.partition.method in ("natural", "dirichlet", "pathological")
        return self.partition.column if uses and self.partition.column != "source" else None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") in PRESETS:
            return settings_of(value)
        return value

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        return require(value, STRATEGIES)

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        return require(value, AGGREGATIONS)

    @field_validator("ranks")
    @classmethod
    def _ranks_hold_something(cls, value: list[int]) -> list[int]:
        if any(rank < 1 for rank in value):
            raise ValueError("a rank is 1 or more")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        from rayft.config.federate_rules import why_not

        if reason := why_not(self):
            raise ValueError(reason)
        return self
