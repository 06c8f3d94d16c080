"""Eight LoRA configurations at once on the CPU, against one process per trial and against one after another.

    python benchmarks/tune.py [--quick] [--no-ray] [--only 512]

SmolLM2-135M-Instruct in bf16, the same eight configurations (ranks 4 to 32, attention, MLP or all linear layers) and
the same rows, all cut to one length, as (a) one pack of rayft, (a') two single-thread lanes with a pack of four each,
(b) plain Ray Tune with a process per trial, each Hugging Face's Trainer with stock PEFT, (c) stock PEFT in one process,
one adapter at a time. The two sides of a claim do their steps in turns, so it is a median over ratios of neighbours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so; it lowers workers, and the peers run at 0

import ray
from arms import PeerArm, ProcessArm, TogetherArm, open_gate, race
from claim import claims_only_on_stdout, note, ratios, report, skip
from configurations import CONFIGURATIONS, CORES, SEED, USUAL, Bench
from tune_peer import TuneArm, sweep

from rayft.models import hub
from rayft.tune.objective import Objective, winners

TARGETS = {64: (2.0, 1.5), 256: (1.4, 1.2), 512: (1.0, 0.95)}
"""Tokens of an adapter's step -> speed-up of (a) over (c), and of (a') over (b)."""
LOSS = Objective("validation_loss")
PROCESSES = "Ray Tune, a process per trial with transformers.Trainer + PEFT, 2 at a time"
SEQUENTIAL = "stock PEFT, one adapter at a time, 1 process, 2 threads"


def speed_claims(bench: Bench, quick: bool, with_ray: bool) -> None:
    """(a) over (c) and (a') over (b) at one number of tokens, start-up apart."""
    recipes = bench.everything()
    pack = bench.adapters("pack", "pack", recipes)
    alone = bench.adapters("alone", "pack", [recipes[USUAL]])
    sequential = bench.adapters("sequential", "sequential", recipes)
    seconds = race([pack, alone, sequential], bench.steps - 1)
    _check_same_work(pack, sequential)
    if with_ray:  # after the others: at 512 tokens all arms at once would need more than 24 GB
        lanes = TogetherArm("lanes", [bench.adapters("lane", "pack", recipes[at::CORES], 1) for at in range(CORES)])
        processes = TuneArm("processes", bench.trials(), str(bench.folder / "tune"), at_once=CORES)
        seconds |= race([lanes, processes], bench.steps - 1)
    for name, values in seconds.items():
        if name != alone.name:
            note(f"{name}: {bench.speed(values):.0f} tokens/s at {bench.tokens} tokens per adapter and step")
    gain = [len(recipes) * one / all_ for one, all_ in zip(seconds[alone.name], seconds[pack.name], strict=True)]
    verdict = "packing alone" if statistics.median(gain) > 1 else "PACKING DOES NOT HELP"
    note(f"{verdict}: {statistics.median(gain):.2f} times one adapter at a time in rayft, at {bench.tokens} tokens")
    over_sequential, over_processes = TARGETS[bench.tokens]
    report(
        f"tune.pack_over_sequential_{bench.tokens}",
        values=ratios(seconds[sequential.name], seconds[pack.name]),
        target=over_sequential,
        better="higher",
        unit=f"speed-up, {bench.batch} x {bench.length} tokens per adapter and step",
        ours=bench.speed(seconds[pack.name]),
        peer=SEQUENTIAL,
        peer_value=bench.speed(seconds[sequential.name]),
        quick=quick,
    )
    if not with_ray:
        return
    report(
        f"tune.lanes_over_processes_{bench.tokens}",
        values=ratios(seconds[processes.name], seconds[lanes.name]),
        target=over_processes,
        better="higher",
        unit=f"speed-up, {bench.batch} x {bench.length} tokens per adapter and step, start-up apart",
        ours=bench.speed(seconds[lanes.name]),
        peer=PROCESSES,
        peer_value=bench.speed(seconds[processes.name]),
        quick=quick,
    )


def memory_claims(folder: Path, base: str, quick: bool) -> None:
    """Peak memory of eight adapters with 64 tokens each: against one adapter with 512, and against eight processes."""
    count = len(CONFIGURATIONS)
    bench = Bench(folder, base, batch=count, length=64, steps=3)
    eight = bench.adapters("eight", "pack", [bench.recipe(number, batch=1) for number in range(count)])
    one = bench.adapters("one", "pack", [bench.recipe(USUAL)])
    options = {"base": hub.fetch(base), "data": bench.data, "scratch": folder / "trainer"}
    trainer = PeerArm("trainer", options | {"steps": bench.steps, "batch": 1, "seed": SEED}, threads=1)
    for arm in (eight, one, trainer):
        arm.start()
        for _ in range(bench.steps - 1):
            arm.step()
        arm.finish()
    ours, single, process = (arm.answers[-1] for arm in (eight, one, trainer))
    shared = process["file_memory"]  # libraries, which eight processes have in memory once
    for claim, peer, target, value in (
        ("tune.memory_of_8_over_1", "one adapter in rayft, equal tokens per step", 1.3, single["peak_memory"]),
        ("tune.memory_over_processes", PROCESSES, 0.35, count * (process["peak_memory"] - shared) + shared),
    ):
        report(
            claim,
            values=[ours["peak_memory"] / value],
            target=target,
            better="lower",
            unit="peak resident memory of a pack of 8 over the peer's (GB)",
            ours=ours["peak_memory"] / 1e9,
            peer=peer,
            peer_value=value / 1e9,
            quick=quick,
        )


def start_up_claim(folder: Path, base: str, quick: bool) -> None:
    """Whole sweeps of short trials, from the call to the result."""
    from rayft.tune import search

    bench = Bench(folder, base, batch=1, length=64, steps=10, validation=8)
    recipe = bench.sweep_recipe("short", scheduler="none")
    ours = _seconds(lambda: search(recipe))
    peer = _seconds(lambda: sweep(bench.trials(), str(folder / "tune"), CORES))
    report(
        "tune.short_trials_with_start_up",
        values=[peer / ours],
        target=3.0,
        better="higher",
        unit=f"wall time of 8 trials of {bench.steps} steps of 64 tokens, peer's over ours (s)",
        ours=ours,
        peer=PROCESSES,
        peer_value=peer,
        quick=quick,
    )


def early_stopping_claims(folder: Path, base: str) -> None:
    """Whole sweeps of long trials: ours with ASHA, the peer's without early stopping; and the best loss of both."""
    from rayft.tune import search

    bench = Bench(folder, base, batch=1, length=64, steps=120, validation=32)
    stops = {"scheduler": "asha", "scheduler_args": {"grace_period": 10, "reduction_factor": 3}}
    recipe = bench.sweep_recipe("asha", **stops)
    recipe["train"]["eval_steps"] = bench.steps  # like the peer at the end; lanes evaluate at the rungs anyway
    found, results = [], []
    ours = _seconds(lambda: found.append(search(recipe)))
    peer = _seconds(lambda: results.extend(sweep(bench.trials(), str(folder / "tune"), CORES)))
    (best, *_) = winners(found[0].rows, [LOSS])
    losses = best.metrics[LOSS.metric], min(result[LOSS.metric] for result in results)
    for claim, values, target, better, unit, pair in (
        ("tune.asha_over_processes", [peer / ours], 3.0, "higher", "wall time, peer's over ours (s)", (ours, peer)),
        ("tune.asha_best_loss", [losses[0] / losses[1]], 1.01, "lower", "best validation loss over the peer's", losses),
    ):
        report(
            claim,
            values=values,
            target=target,
            better=better,  # type: ignore[arg-type]
            unit=unit,
            ours=pair[0],
            peer=f"{PROCESSES}, without early stopping",
            peer_value=pair[1],
            quick=False,
        )


def _check_same_work(pack: ProcessArm, sequential: ProcessArm) -> None:
    """Both sides have the same losses at the first step, up to bf16."""
    ours, theirs = pack.answers[0]["losses"], sequential.answers[0]["losses"]
    different = {
        name: (ours.get(name), loss) for name, loss in theirs.items() if abs(ours.get(name, 0) / loss - 1) > 0.03
    }
    if different:
        raise RuntimeError(f"the arms do not train on the same rows: first losses {different}")


def _name_skipped(quick: bool, with_ray: bool) -> None:
    if quick:
        for tokens in list(TARGETS)[1:]:
            skip(f"tune.pack_over_sequential_{tokens}", "--quick")
    for claim, shortened in (
        *((f"tune.lanes_over_processes_{tokens}", tokens != 64) for tokens in TARGETS),
        ("tune.short_trials_with_start_up", False),
        ("tune.asha_over_processes", True),
        ("tune.asha_best_loss", True),
    ):
        if not with_ray:
            skip(claim, "--no-ray")
        elif quick and shortened:
            skip(claim, "--quick")


def _seconds(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 tokens per adapter only, 10 steps; under 5 minutes")
    parser.add_argument("--no-ray", action="store_true", help="without the claims against Ray Tune")
    parser.add_argument("--only", choices=[*map(str, TARGETS), "memory", "sweeps"], help="one part of the claims")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="another base model, for the tests")
    options = parser.parse_args()
    quick, base, with_ray, only = options.quick, options.base, not options.no_ray, options.only
    claims_only_on_stdout()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if only in (None, "memory"):
            memory_claims(folder / "memory", base, quick)
        if only == "memory":
            return
        if with_ray:
            ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
        with open_gate() if with_ray else nullcontext():
            _claims(folder, base, quick, with_ray, only)
        if with_ray:
            ray.shutdown()
        if only is None:
            _name_skipped(quick, with_ray)


def _claims(folder: Path, base: str, quick: bool, with_ray: bool, only: str | None) -> None:
    """All but those of memory."""
    for batch, length, steps in ((1, 64, 11),) if quick else ((1, 64, 16), (2, 128, 11), (2, 256, 11)):
        if only not in (None, str(batch * length)):
            continue
        bench = Bench(folder / f"{batch}x{length}", base, batch=batch, length=length, steps=steps)
        speed_claims(bench, quick, with_ray)
    if with_ray and only in (None, "sweeps"):
        start_up_claim(folder / "short", base, quick)
        if not quick:
            early_stopping_claims(folder / "long", base)


if __name__ == "__main__":
    main()
