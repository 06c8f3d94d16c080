"""Shares of requests, and keys that stay where they are."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from rayft.errors import UsageError
from rayft.runs.versions import Alias, Version
from rayft.serve.rollout import choose, place


def alias(weights: dict[int, float], salt: str = "salt", versions: int = 3) -> Alias:
    made = tuple(
        Version(number, f"hash{number}", f"/copy/{number}", None, None, "", None, None, 4, 1, 0.0)
        for number in range(1, versions + 1)
    )
    return Alias("bot", made, weights, salt=salt)


def chosen(alias: Alias, keys: int = 4000) -> dict[str, int]:
    return {f"user-{key}": choose(alias, f"user-{key}").number for key in range(keys)}


@pytest.mark.parametrize("weights", [{1: 0.85, 2: 0.1, 3: 0.05}, {1: 0.5, 3: 0.5}, {1: 0.999, 2: 0.001}])
def test_the_split_is_that_of_the_weights(weights: dict[int, float]) -> None:
    """Chi-square at 0.1%, over keys of several salts and over draws of a fixed seed."""
    from scipy.stats import chisquare

    draw = random.Random(17)
    counts = [Counter(chosen(alias(weights, salt), 20_000).values()) for salt in ("a", "b", "c")]
    counts.append(Counter(choose(alias(weights), None, draw.random).number for _ in range(20_000)))
    counts.append(Counter(choose(alias(weights), "", draw.random).number for _ in range(20_000)))
    for count in counts:
        assert set(count) <= set(weights)
        seen = [count[number] for number in sorted(weights)]
        assert chisquare(seen, [20_000 * weights[number] for number in sorted(weights)]).pvalue > 1e-3


def test_keys_are_sticky_and_salts_independent() -> None:
    split = alias({1: 0.5, 2: 0.5})
    assert chosen(split) == chosen(split)
    with_others = alias({1: 0.5, 2: 0.5}, salt="other")
    both = [first == second for first, second in zip(chosen(split).values(), chosen(with_others).values(), strict=True)]
    assert 0.45 < sum(both) / len(both) < 0.55


def test_the_place_of_a_key_never_changes() -> None:
    """Known numbers: another hash would move every user of every running canary at the next release."""
    salt = "0123456789abcdef"
    assert [round(place(salt, f"user-{key}"), 3) for key in range(6)] == [0.64, 0.689, 0.751, 0.553, 0.557, 0.727]
    split = alias({1: 0.3, 2: 0.7}, salt)
    assert [choose(split, f"user-{key}").number for key in range(6)] == [2, 2, 1, 2, 2, 1]
    assert choose(split, "ü\ud800", lambda: 2.0).number in (1, 2)


def test_a_growing_canary_keeps_its_users() -> None:
    before = chosen(alias({1: 1.0}))
    for share in (0.01, 0.1, 0.25, 0.5, 0.9):
        now = chosen(alias({1: 1 - share, 2: share}))
        assert all(now[user] >= version for user, version in before.items()), "nobody goes back"
        assert sum(version == 2 for version in now.values()) == pytest.approx(share * len(now), rel=0.25)
        before = now
    before = chosen(alias({1: 0.85, 2: 0.1, 3: 0.05}))
    now = chosen(alias({1: 0.5, 2: 0.3, 3: 0.2}))
    assert all(now[user] >= version for user, version in before.items())
    assert any(now[user] > version for user, version in before.items())


def test_shrinking_moves_only_those_who_must() -> None:
    wide, narrow = chosen(alias({1: 0.5, 2: 0.5})), chosen(alias({1: 0.9, 2: 0.1}))
    assert all(wide[user] == 2 for user, version in narrow.items() if version == 2)


def test_one_version_gets_everything() -> None:
    assert set(chosen(alias({2: 1.0})).values()) == {2}


def test_nothing_served() -> None:
    with pytest.raises(UsageError, match="R432"):
        choose(alias({}), "user")


def test_rounding_never_leaves_a_request_without_a_version() -> None:
    thirds = alias({1: 0.1, 2: 0.2, 3: 0.7 - 2**-53})
    assert choose(thirds, None, lambda: 1 - 2**-53).number == 1


def test_rollback_is_at_once_for_other_processes(tmp_path: Path) -> None:
    from rayft.runs.registry import Registry
    from tests.runs.adapters import adapter_folder

    registry, server = Registry(tmp_path / "registry"), Registry(tmp_path / "registry")
    for number in (1, 2):
        registry.register("bot", adapter_folder(tmp_path / str(number), float(number)))
    registry.promote("bot", 1)
    registry.promote("bot", 2)
    assert choose(server.alias("bot"), "user").number == 2
    registry.rollback("bot")
    assert choose(server.alias("bot"), "user").number == 1
