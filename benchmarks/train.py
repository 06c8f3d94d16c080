"""Training speed and memory on the CPU against Hugging Face's Trainer: same data, model and steps.

    python benchmarks/train.py [--quick]

SmolLM2-135M-Instruct, LoRA r16 on all linear layers, bf16, 8 question-answer rows of uneven length per step. The arms
(rayft with 1 and 2 single-thread workers on Ray, packed or padded; the Trainer with as many threads as rayft has
workers) do their steps in turns, so a claim is a median over ratios of neighbouring steps. Real tokens only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so; it lowers workers, and the peers run at 0

import ray
from arms import Arm, PeerArm, RayftArm, open_gate, race
from claim import claims_only_on_stdout, note, ratios, report, skip
from questions import SPREAD, write_rows

from rayft import config
from rayft.data import Prepared
from rayft.data.plan import step_plan
from rayft.models import hub
from rayft.train.preparation import settle

BASE, BATCH, SEED, SAVE_STEPS = "smollm2-135m-instruct", 8, 17, 10
VOCABULARY = 49152
PEER = "transformers.Trainer + PEFT, padded, 2 threads, no Ray"


class Bench:
    """One data set, and the arms that train on it."""

    def __init__(self, folder: Path, *, max_length: int, median: int, steps: int, spread: float = SPREAD) -> None:
        self.folder, self.max_length, self.steps = folder / f"{max_length}-{median}", max_length, steps
        self.folder.mkdir()
        write_rows(self.folder / "rows.jsonl", BATCH * (steps + 1), median=median, spread=spread)
        recipe = config.load(self.recipe("data", workers=0)).recipe
        self.data = settle(recipe.model_dump(mode="json"), BASE, "cpu").data_folder
        examples = Prepared(self.data, "").split("train")
        assert examples is not None
        plan = step_plan(examples.lengths, BATCH, SEED, 0)[1:]  # the first step warms up
        self.real = [int(examples.lengths[step].sum()) for step in plan]
        self.padded = [int(examples.lengths[step].max()) * len(step) for step in plan]

    def recipe(self, name: str, *, workers: int, padding_free: bool = True) -> dict[str, Any]:
        return {
            "name": name,
            "storage": str(self.folder / "runs"),
            "seed": SEED,
            "model": {"base": BASE, "dtype": "bf16"},
            "adapter": {"method": "lora", "rank": 16, "alpha": 32},
            "data": {
                "train": str(self.folder / "rows.jsonl"),
                "max_length": self.max_length,
                "padding_free": padding_free,
            },
            "train": {
                "max_steps": self.steps + 1,
                "global_batch_size": BATCH,
                "save_steps": SAVE_STEPS,
                "report_to": [],
            },
            "scale": {"workers": workers, "device": "cpu"},
        }

    def rayft(self, name: str, *, workers: int, padding_free: bool = True) -> RayftArm:
        return RayftArm(self.recipe(name, workers=workers, padding_free=padding_free))

    def peer(self, name: str, *, chunked: bool = False) -> PeerArm:
        options = {"base": hub.fetch(BASE), "data": self.data, "scratch": self.folder / name}
        options |= {"steps": self.steps + 1, "batch": BATCH, "seed": SEED}
        return PeerArm(name, options, threads=2, chunked=chunked)

    def race(self, arms: list[Arm]) -> dict[str, list[float]]:
        """Seconds of each timed step of each arm, taken in turns."""
        seconds = race(arms, self.steps)
        for arm in arms:
            speeds = [tokens / second for tokens, second in zip(self.real, seconds[arm.name], strict=True)]
            note(f"{arm.name}: {statistics.median(speeds):.0f} real tokens/s at {self.max_length} tokens")
        return seconds

    def speed(self, seconds: list[float]) -> float:
        """Real tokens per second over all timed steps."""
        return sum(self.real) / sum(seconds)


def all_claims(bench: Bench, quick: bool) -> None:
    """(a), (c), (d), (e) and the speed of the chunked loss."""
    one = bench.rayft("rayft-1-worker", workers=1)
    padded = bench.rayft("rayft-1-worker-padded", workers=1, padding_free=False)
    two = bench.rayft("rayft-2-workers", workers=2)
    seconds = bench.race([one, padded, two])
    speed = {name: bench.speed(values) for name, values in seconds.items()}

    step = statistics.median(seconds[one.name])
    overhead = callback_seconds(one) / bench.steps
    report(
        "train.callback_share",
        values=[overhead / step],
        target=0.02,
        better="lower",
        unit="seconds in rayft's callback and report per second of step",
        ours=overhead,
        peer="the whole step",
        peer_value=step,
        quick=quick,
    )
    ceiling = sum(bench.padded) / sum(bench.real)
    note(f"ceiling of packed over padded (padded over real tokens): {ceiling:.3f}")
    steps = zip(seconds[padded.name], seconds[one.name], bench.padded, bench.real, strict=True)
    report(
        "train.packed_over_padded",
        values=[(slow / fast) / (pads / tokens) for slow, fast, pads, tokens in steps],
        target=0.9,
        better="higher",
        unit=f"speed-up per ceiling ({ceiling:.3f} = padded over real tokens)",
        ours=speed[one.name],
        peer="rayft padded, 1 worker",
        peer_value=speed[padded.name],
        quick=quick,
    )
    report(
        "train.two_workers_over_one",
        values=ratios(seconds[one.name], seconds[two.name]),
        target=1.8,
        better="higher",
        unit="speed-up",
        ours=speed[two.name],
        peer="rayft, 1 worker",
        peer_value=speed[one.name],
        quick=quick,
    )
    shipped = bench.rayft("rayft-as-shipped", workers=2)
    peer, chunked = bench.peer("trainer"), bench.peer("trainer-chunked", chunked=True)
    seconds = bench.race([shipped, peer, chunked])  # a race of its own: all its runs are in memory at once
    as_shipped(bench, 256, seconds[shipped.name], seconds[peer.name], quick)
    report(
        "train.chunked_loss_time",
        values=ratios(seconds[chunked.name], seconds[peer.name]),
        target=1.0,
        better="lower",
        unit="time of a step over the peer's",
        ours=bench.speed(seconds[chunked.name]),
        peer=PEER,
        peer_value=bench.speed(seconds[peer.name]),
        quick=quick,
    )


def as_shipped(bench: Bench, tokens: int, ours: list[float], peer: list[float], quick: bool) -> None:
    report(
        f"train.shipped_over_trainer_{tokens}",
        values=ratios(peer, ours),
        target={256: 2.0, 512: 2.3}[tokens],
        better="higher",
        unit=f"speed-up in real tokens/s, rows of at most {bench.max_length} tokens",
        ours=bench.speed(ours),
        peer=PEER,
        peer_value=bench.speed(peer),
        quick=quick,
    )


def callback_seconds(arm: RayftArm) -> float:
    """Seconds in our callback and `ray.train.report` over the timed steps, without the waiting at the gate.

    From the run's own log, whose rates are over 20 steps; what happened at the end of a step counts to the next one.
    """
    row = arm.result.metrics
    return float(row["report_share"] * row["seconds_per_step"] * row["step"] - arm.waited)


def memory_claims(folder: Path, quick: bool) -> None:
    """Peak memory and live logits at 8 rows of exactly 256 tokens, each side in a process of its own."""
    bench = Bench(folder, max_length=256, median=300, spread=0, steps=1)
    peer = bench.peer("trainer-memory")
    peer.start()
    peer.step()
    peer.finish()
    recipe = json.dumps(bench.recipe("memory", workers=0))
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), recipe, str(VOCABULARY)]
    ours = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    for claim, name, target, unit, scale in [
        ("train.peak_memory", "peak_memory", 0.75, "peak resident memory over the peer's (GB)", 1e9),
        ("train.live_logits", "largest_logits", 0.125, "most logits at once over the peer's (elements)", 1),
    ]:
        report(
            claim,
            values=[ours[name] / peer.answers[-1][name]],
            target=target,
            better="lower",
            unit=unit,
            ours=ours[name] / scale,
            peer=PEER,
            peer_value=peer.answers[-1][name] / scale,
            quick=quick,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rows of half the length, 10 steps; under 5 minutes")
    quick = parser.parse_args().quick
    claims_only_on_stdout()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        memory_claims(folder, quick)
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
        with open_gate():
            if quick:
                all_claims(Bench(folder, max_length=128, median=100, steps=10), quick)
                skip("train.shipped_over_trainer_512", "--quick")
            else:
                all_claims(Bench(folder, max_length=256, median=205, steps=15), quick)
                bench = Bench(folder, max_length=512, median=205, steps=15)
                two, peer = bench.rayft("rayft-2-workers", workers=2), bench.peer("trainer")
                seconds = bench.race([two, peer])
                as_shipped(bench, 512, seconds[two.name], seconds[peer.name], quick)
        ray.shutdown()


if __name__ == "__main__":
    main()
