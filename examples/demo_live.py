"""A finished run goes live on a server under load: canary, promotion, rollback, and nobody notices.

    python examples/demo_live.py                    # `make demo-live`, about 5 minutes on two cores
    python examples/demo_live.py --seconds 30 --clients 12 --out live.png

Trains a short run of the quickstart where there is none, starts a server with its step 4 as version 1 of `orders` and
eight more adapters, and keeps it busy. Then the end of the run becomes version 2: 10% of the requests, half, all; then
everything is rolled back. Prints what happened as JSON and writes one picture. Exit code 1 if any request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rayft.serve import Server, deploy
from rayft.train import fit, style

RECIPE = Path(__file__).parent / "recipes/quickstart.yaml"
RUN, ALIAS, TENANTS, RANK = "demo-live", "orders", 8, 16
PHASES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("version 1", "", None),
    ("canary 10%", "weights", {"weights": {1: 0.9, 2: 0.1}}),
    ("50%", "weights", {"weights": {1: 0.5, 2: 0.5}}),
    ("promoted", "promote", {"version": 2}),
    ("rolled back", "rollback", {}),
]
"""Name, route below /v1/adapters/orders, and what is sent to it. The last step goes back to the split before it."""


@dataclass(frozen=True)
class Answer:
    """One request that ended."""

    time: float
    """Seconds since the beginning of the load."""
    model: str
    version: int | None
    seconds: float
    error: str | None = None


@dataclass
class Load:
    """Clients that ask for one adapter after the other, half of the time for `orders`."""

    url: str
    models: list[str]
    begin: float = field(default_factory=time.monotonic)
    answers: list[Answer] = field(default_factory=list)

    async def client(self, number: int, until: asyncio.Event) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while not until.is_set():
                model = ALIAS if draw.random() < 0.5 else draw.choice(self.models)
                await self.ask(http, model, f"Please send {draw.randint(1, 9)} lamps to Anna.")

    async def ask(self, http: httpx.AsyncClient, model: str, text: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 16}
        begin, version, error = time.monotonic(), None, None
        try:
            response = await http.post("/v1/chat/completions", json=body)
            if response.status_code == 200:
                version = int(response.headers.get("x-rayft-version", 0)) or None
            else:
                error = response.text
        except httpx.HTTPError as problem:
            error = repr(problem)
        end = time.monotonic()
        self.answers.append(Answer(end - self.begin, model, version, end - begin, error))


def trained(storage: str) -> None:
    """The run that goes live."""
    if not (Path(storage) / RUN / "adapter").exists():
        print("$ rayft train examples/recipes/quickstart.yaml (8 steps)", flush=True)
        short = ["train.max_steps=8", "train.save_steps=4", "evaluate.metrics=[]", "evaluate.samples=0"]
        fit(RECIPE, [f"name={RUN}", f"storage={storage}", *short], mode="overwrite", answer=None)


def tenants(storage: str) -> dict[str, str]:
    """Adapters with random numbers, for the other half of the load."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from rayft.models import hub

    folder = Path(storage) / "demo-live-tenants"
    names = {f"tenant-{number}": str(folder / str(number)) for number in range(1, TENANTS + 1)}
    if not folder.exists():
        base = hub.fetch("smollm2-135m-instruct")
        config = LoraConfig(r=RANK, target_modules="all-linear", base_model_name_or_path=base)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for number, path in enumerate(names.values()):
            torch.manual_seed(number)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(path)
    return names


async def show(server: Server, seconds: float, clients: int) -> tuple[Load, list[tuple[float, str]]]:
    """The load, and when each phase began."""
    load, stop = Load(server.url, [model for model in server.models if model != ALIAS]), asyncio.Event()
    tasks = [asyncio.create_task(load.client(number, stop)) for number in range(clients)]
    phases = []
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        for name, route, body in PHASES:
            if name == PHASES[1][0]:
                print(f"$ POST /v1/adapters  run:{RUN} becomes version 2 of {ALIAS}", flush=True)
                await change(http, "/v1/adapters", {"name": ALIAS, "source": f"run:{RUN}", "weight": 0.1})
            elif body is not None:
                print(f"$ POST /v1/adapters/{ALIAS}/{route} {json.dumps(body)}", flush=True)
                await change(http, f"/v1/adapters/{ALIAS}/{route}", body)
            phases.append((time.monotonic() - load.begin, name))
            await asyncio.sleep(seconds)
    stop.set()
    await asyncio.gather(*tasks)
    return load, phases


async def change(http: httpx.AsyncClient, route: str, body: dict[str, Any]) -> None:
    response = await http.post(route, json=body)
    if response.status_code != 200:
        raise SystemExit(f"{route}: {response.text}")


def summary(load: Load, phases: list[tuple[float, str]]) -> dict[str, Any]:
    ends = [*(begin for begin, _ in phases[1:]), float("inf")]
    by_phase = {}
    for (begin, name), end in zip(phases, ends, strict=True):
        inside = [answer for answer in load.answers if begin <= answer.time < end]
        versions = [answer.version for answer in inside if answer.model == ALIAS and answer.error is None]
        by_phase[name] = {
            "requests": len(inside),
            "share_of_version_2": round(versions.count(2) / max(1, len(versions)), 3),
            "median_seconds": round(statistics.median(a.seconds for a in inside), 3) if inside else None,
        }
    failed = [answer.error for answer in load.answers if answer.error is not None]
    return {"requests": len(load.answers), "failed": len(failed), "errors": failed[:3], "phases": by_phase}


def draw(load: Load, phases: list[tuple[float, str]], path: Path) -> None:
    figure = style.canvas(5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.2])
    asked = [answer for answer in load.answers if answer.model == ALIAS and answer.error is None]
    times = [answer.time for answer in asked]
    window = 12
    shares = [
        statistics.mean(answer.version == 2 for answer in asked[max(0, at - window + 1) : at + 1])
        for at in range(len(asked))
    ]
    top.step(times, shares, where="post", color=style.BLUE, linewidth=1.8)
    top.fill_between(times, shares, step="post", color=style.BLUE, alpha=0.15, linewidth=0)
    top.set_ylabel(f"share of version 2\n(last {window} requests)")
    top.set_ylim(-0.04, 1.08)
    for label, colour, chosen in (
        (f"{ALIAS}, version 1", style.ORANGE, [a for a in asked if a.version == 1]),
        (f"{ALIAS}, version 2", style.BLUE, [a for a in asked if a.version == 2]),
        (f"{TENANTS} other adapters and the base", style.GREY, [a for a in load.answers if a.model != ALIAS]),
        ("failed", style.RED, [a for a in load.answers if a.error is not None]),
    ):
        small = colour == style.GREY
        x, y = [answer.time for answer in chosen], [answer.seconds for answer in chosen]
        if chosen or label == "failed":
            bottom.scatter(x, y, s=6 if small else 12, color=colour, alpha=0.35 if small else 0.8, linewidth=0,
                           label=f"{label} ({len(chosen)})", zorder=1 if small else 2)  # fmt: skip
    bottom.set_ylabel("seconds per request")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("seconds under load")
    for axes in (top, bottom):
        style.frame(axes)
        for begin, _ in phases[1:]:
            axes.axvline(begin, color=style.GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    for begin, name in phases:
        top.text(begin + 0.4, 1.09, name, fontsize=9, color=style.INK, va="bottom")
    bottom.legend(frameon=False, fontsize=8.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    style.save(figure, "", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each phase")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--out", type=Path, help="the picture; STORAGE/demo-live.png by default")
    options = parser.parse_args()
    storage = str(Path(options.storage).absolute())
    trained(storage)
    out = options.out or Path(storage, "demo-live.png")
    serve = {"port": 0, "adapters": {ALIAS: f"run:{RUN}@step-4", **tenants(storage)}}
    registry = Path(storage, "demo-live-registry")
    recipe = {
        "name": "demo-live-server",
        "storage": storage,
        "model": {"base": "smollm2-135m-instruct"},
        "data": {"train": "none"},
        "serve": {**serve, "registry": str(registry)},
    }
    forget(registry)
    with deploy(recipe) as server:
        print(f"$ rayft serve ...    {server.url}, {len(server.models)} models", flush=True)
        load, phases = asyncio.run(show(server, options.seconds, options.clients))
    facts = summary(load, phases)
    draw(load, phases, out)
    print(json.dumps({**facts, "picture": str(out)}, indent=2))
    raise SystemExit(1 if facts["failed"] else 0)


def forget(folder: Path) -> None:
    """The names of an earlier demonstration."""
    from rayft.runs.registry import Registry

    registry = Registry(str(folder))
    for name in list(registry.aliases()):
        registry.remove(name)


if __name__ == "__main__":
    main()
