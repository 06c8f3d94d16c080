"""Client-level differential privacy: clipping, calibrated noise, and an accountant that stops in time.

DP-FedAvg (McMahan et al., arXiv 1710.06963) with adaptive clipping (Andrew et al., arXiv 1905.03871). Neighbouring
federations differ in one client, added or removed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from rayft.config.federate import Federate, Privacy
from rayft.errors import UsageError
from rayft.federate.noise import Noise
from rayft.federate.state import State, norm, scaled


def clipped(change: State, clip: float | None) -> tuple[State, int]:
    """(the change, shortened to ``clip`` over all tensors together, whether it was short enough as 1 or 0).

    A change of length 0 stays as it is.
    """
    length = norm(change)
    if clip is None or length <= clip:
        return change, 1
    return scaled(change, clip / length), 0


def expected(federate: Federate, population: int) -> float:
    """Clients of a round: expected with Poisson sampling, exact with fixed size."""
    size = federate.cohort.size
    wanted = size * population if size <= 1 else size
    if federate.cohort.sampling == "poisson":
        return min(wanted, float(population))
    return float(min(max(1, round(wanted)), population))


def denominator(federate: Federate, population: int) -> float:
    """What the noisy sum is divided by: fixed, so that a client that drops out only takes its signal away."""
    return expected(federate, population)


def count_stddev(federate: Federate, population: int) -> float:
    """Standard deviation of the noise on the number of unclipped clients: a twentieth of the cohort by default."""
    assert federate.privacy is not None
    return federate.privacy.count_stddev or expected(federate, population) / 20


def noise_multiplier(federate: Federate, population: int) -> float:
    """Of the noise on the sum. With adaptive clipping larger than `noise_multiplier`, since the count is released too:
    (z^-2 - (2 sigma_b)^-2)^(-1/2), so that both together cost what z says (arXiv 1905.03871, theorem 1).

    Raises UsageError R911 when the count's noise is too small for that.
    """
    privacy = federate.privacy
    assert privacy is not None
    if not privacy.adaptive or not privacy.noise_multiplier:
        return privacy.noise_multiplier
    rest = privacy.noise_multiplier**-2 - (2 * count_stddev(federate, population)) ** -2
    if rest <= 0:
        raise UsageError(
            "R911",
            f"the noise on the count of clients ({count_stddev(federate, population):.3g}) must be larger than half of "
            f"noise_multiplier ({privacy.noise_multiplier:.3g})",
            "raise federate.privacy.count_stddev or the cohort",
        )
    return float(rest**-0.5)


def next_clip(federate: Federate, clip: float, unclipped: int, population: int, noise: Noise) -> float:
    """The clipping norm of the next round: C exp(-rate (b - quantile)), b the noisy share of changes *not* longer than
    C. Most of them longer: C grows."""
    privacy = federate.privacy
    assert privacy is not None
    counted = unclipped
    stddev = count_stddev(federate, population) if privacy.noise_multiplier else 0.0
    share = (counted + float(noise.normal((1,), stddev))) / expected(federate, population)
    return clip * math.exp(-privacy.clip_learning_rate * (share - privacy.target_quantile))


@dataclass(frozen=True)
class Release:
    """One noisy sum that left the server. The events of a run are what its epsilon is computed from."""

    round: int
    noise_multiplier: float
    sampling: str
    """poisson, fixed, or local."""
    population: int
    cohort: float
    """Expected clients."""


@dataclass
class Ledger:
    """What has been released so far, and what it cost."""

    privacy: Privacy
    population: int
    releases: list[Release]

    @property
    def delta(self) -> float:
        return self.privacy.delta or self.population**-1.1

    def event(self, federate: Federate, number: int) -> Release:
        """The release that round ``number`` would be."""
        how = "local" if self.privacy.mode == "local" else federate.cohort.sampling
        return Release(number, self.privacy.noise_multiplier, how, self.population, expected(federate, self.population))

    def epsilon(self, *more: Release) -> float:
        """Of all releases so far, and of these too. Infinite where nothing was noised."""
        return epsilon([*self.releases, *more], self.delta)

    def allows(self, release: Release) -> bool:
        """Whether the budget holds another release."""
        return self.privacy.epsilon is None or self.epsilon(release) <= self.privacy.epsilon

    def plain(self) -> list[dict[str, Any]]:
        return [asdict(release) for release in self.releases]


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """The epsilon of several releases at ``delta``, by dp-accounting.

    Poisson: privacy loss distributions, add or remove one client. Fixed size: Renyi, replace one, whose sensitivity is
    twice the clipping norm, so half of the noise multiplier counts. local: each client's own, without sampling, where
    any change may become any other (half of the multiplier again); the worst case is a client that was always there.
    """
    counts = Counter((r.noise_multiplier, r.sampling, r.population, r.cohort) for r in releases)
    return _epsilon(tuple(sorted(counts.items())), delta)


@lru_cache(maxsize=64)  # each is asked twice: before its round, and for its row
def _epsilon(counts: tuple[tuple[tuple[float, str, int, float], int], ...], delta: float) -> float:
    if not counts:
        return 0.0
    if any(multiplier == 0 for (multiplier, *_), _ in counts):
        return math.inf
    if len({sampling for (_, sampling, *_), _ in counts}) > 1:
        raise ValueError("releases of different samplings have different neighbours and cannot be added up")
    import dp_accounting
    from dp_accounting import pld, rdp

    sampling = counts[0][0][1]
    neighbours = dp_accounting.NeighboringRelation
    accountant: Any
    if sampling == "fixed":
        accountant = rdp.RdpAccountant(neighboring_relation=neighbours.REPLACE_ONE)
    else:
        accountant = pld.PLDAccountant(neighbours.ADD_OR_REMOVE_ONE)
    for (multiplier, _, population, cohort), count in counts:
        if sampling == "poisson":
            event = dp_accounting.PoissonSampledDpEvent(cohort / population, dp_accounting.GaussianDpEvent(multiplier))
        elif sampling == "fixed":
            event = dp_accounting.SampledWithoutReplacementDpEvent(
                population, round(cohort), dp_accounting.GaussianDpEvent(multiplier / 2)
            )
        else:
            event = dp_accounting.GaussianDpEvent(multiplier / 2)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))
