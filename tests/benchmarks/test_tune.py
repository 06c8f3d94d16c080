"""`benchmarks/tune.py`: its claims, and that its sides do the same work."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tune.sweeps import trial

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
FIELDS = {
    *("claim", "value", "target", "better", "unit", "ours", "peer", "peer_value", "runs", "spread", "quick", "commit")
}
SECONDS = {"pack": 2.0, "alone": 0.5, "sequential": 5.0, "lanes": 1.0, "processes": 1.5}


@dataclass
class FakeArm:
    """An arm whose steps take the time that SECONDS says."""

    name: str
    answers: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> float:
        megabytes = {"eight": 900, "one": 800}.get(self.name, 700)
        self.answers.append({"peak_memory": megabytes * 1e6, "file_memory": 200e6, "losses": {"c0": 4.0}})
        return 1.0

    def step(self) -> float:
        return SECONDS.get(self.name, 0.0)

    def finish(self) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with arms that only pretend."""
    import tune

    clock = iter(range(10**6))
    monkeypatch.setattr(tune.hub, "fetch", lambda base: base)
    monkeypatch.setattr(tune.Bench, "__init__", _without_data)
    monkeypatch.setattr(tune.Bench, "adapters", lambda bench, name, *args: FakeArm(name))
    for arm in ("PeerArm", "TuneArm", "TogetherArm"):
        monkeypatch.setattr(tune, arm, lambda name, *args, **kwargs: FakeArm(name))
    monkeypatch.setattr(tune, "open_gate", nullcontext)
    monkeypatch.setattr(tune, "ray", SimpleNamespace(init=lambda **_: None, shutdown=lambda: None))
    monkeypatch.setattr(tune, "sweep", lambda *args: [{"validation_loss": loss} for loss in (0.6, 0.5)])
    swept = SimpleNamespace(rows=[trial(0, value=0.51), trial(1, "pruned", 10, value=0.1)])
    monkeypatch.setattr("rayft.tune.search", lambda recipe: swept, raising=False)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    return tune


def _without_data(bench: Any, folder: Path, base: str, *, batch: int, length: int, steps: int, **_: Any) -> None:
    vars(bench).update(folder=folder, base=base, batch=batch, length=length, steps=steps, validation=0, data="data")


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, dict[str, Any]]:
    out = io.StringIO()
    monkeypatch.setattr("claim._OUTPUT", out)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the script puts standard error in its place
    monkeypatch.setattr(sys, "argv", ["tune.py", *options])
    script.main()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    claims = {line["claim"]: line for line in lines}
    assert len(claims) == len(lines), "each claim stands there once"
    return claims


def documented() -> set[str]:
    """The claims of the page's table, where `tune.x_64`, `_256` stands for `tune.x_64` and `tune.x_256`."""
    found = set()
    for cell in re.findall(r"^\| (`tune\.[^|]+) \|", DOCS.read_text(), flags=re.M):
        first, *others = re.findall(r"`([^`]+)`", cell)
        found |= {first, *(first.rpartition("_")[0] + other for other in others)}
    return found


@pytest.mark.parametrize("options", [(), ("--quick",), ("--no-ray",), ("--quick", "--no-ray")])
def test_every_claim_is_measured_or_skipped(
    options: tuple[str, ...], script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = run(script, monkeypatch, *options)
    assert set(claims) == documented(), "docs/benchmarks.md lists exactly these"
    for line in claims.values():
        if "skipped" in line:
            assert set(line) == {"claim", "skipped"} and line["skipped"] in options
        else:
            assert set(line) == FIELDS and line["quick"] == ("--quick" in options)
            assert line["better"] in ("higher", "lower")
    assert ("skipped" in claims["tune.pack_over_sequential_512"]) == ("--quick" in options)
    assert ("skipped" in claims["tune.lanes_over_processes_64"]) == ("--no-ray" in options)


def test_values(script: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    claims = run(script, monkeypatch)
    said = capfd.readouterr().err
    assert claims["tune.pack_over_sequential_256"]["value"] == 2.5
    assert claims["tune.pack_over_sequential_256"]["runs"] == 10
    assert claims["tune.lanes_over_processes_512"]["value"] == 1.5
    assert claims["tune.lanes_over_processes_512"]["ours"] == 8 * 512 / 1.0  # tokens per second of all eight
    assert claims["tune.memory_of_8_over_1"]["value"] == 1.125
    assert claims["tune.memory_over_processes"]["peer_value"] == pytest.approx(8 * 0.5 + 0.2)
    assert claims["tune.asha_best_loss"]["value"] == pytest.approx(0.51 / 0.5), "a pruned trial's loss does not count"
    assert "packing alone: 2.00 times one adapter at a time" in said
    SECONDS["alone"], before = 0.2, SECONDS["alone"]
    try:
        run(script, monkeypatch, "--quick")
    finally:
        SECONDS["alone"] = before
    assert "PACKING DOES NOT HELP: 0.80 times" in capfd.readouterr().err


def test_arms_that_train_on_other_rows_are_found_out(script: Any) -> None:
    one, other = FakeArm("pack"), FakeArm("sequential")
    one.start(), other.start()
    script._check_same_work(one, other)
    other.answers[0]["losses"] = {"c0": 4.2}
    with pytest.raises(RuntimeError, match="do not train on the same rows"):
        script._check_same_work(one, other)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_process_ends_when_it_is_told_to(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps left or not."""
    import arms

    script = tmp_path / "script.py"
    loop = f"for step in range({steps}):\n    print(json.dumps({{'step': step}}), flush=True)\n"
    script.write_text(f"import json, sys\n{loop}    if not sys.stdin.readline(): break\n")
    arm = arms.ProcessArm("arm", str(script), [])
    assert arm.start() > 0 and arm.step() > 0
    arm.finish()
    assert [answer["step"] for answer in arm.answers] == [0, 1] and arm.process.returncode == 0


@pytest.fixture
def bench(tmp_path: Path, tiny_model_folder: str) -> Any:
    import configurations

    return configurations.Bench(tmp_path / "bench", tiny_model_folder, batch=2, length=48, steps=3, validation=4)


def test_rows_have_one_length_and_are_all_trained_on(bench: Any) -> None:
    from rayft.data import Prepared

    train, validation = (Prepared(bench.data, "").split(name) for name in ("train", "validation"))
    assert train is not None and validation is not None
    assert train.lengths.tolist() == [48] * 6 and len(validation) == 4
    assert train[0]["loss_weights"][1:].tolist() == [1.0] * 47


def test_a_pack_and_stock_peft_do_the_same_work(bench: Any, tiny_model_folder: str) -> None:
    import adapters

    from rayft import config

    recipes = [config.load(bench.recipe(number)).recipe for number in (0, 3, 4)]
    rounds = [way(recipes, tiny_model_folder, bench.data) for way in (adapters.pack, adapters.sequential)]
    for _ in range(3):
        ours, theirs = (do_round() for do_round in rounds)
        assert ours == pytest.approx(theirs, rel=1e-3), "bf16 on both sides"
        assert list(ours) == ["c0", "c3", "c4"]


@pytest.mark.slow
def test_plain_ray_tune_steps_at_the_gate_and_reports_rayfts_loss(bench: Any, ray_cluster: str, tmp_path: Path) -> None:
    import arms
    import tune_peer

    with arms.open_gate():
        arm = tune_peer.TuneArm("processes", bench.trials()[:2], str(tmp_path / "tune"), at_once=1)
        seconds = arms.race([arm], bench.steps - 1)["processes"]
    assert len(seconds) == 2 and min(seconds) > 0
    assert len(arm.results) == 2
    assert all(4 < result["validation_loss"] < 7 and result["peak_memory"] > 1e8 for result in arm.results)
