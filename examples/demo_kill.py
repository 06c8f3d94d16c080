"""Train the same recipe twice, once undisturbed and once with two murders, and lay the curves on each other.

    python examples/demo_kill.py                                        # the quickstart (`make demo-kill`)
    python examples/demo_kill.py my.yaml train.max_steps=60 --out my.png

In the second run a worker gets `kill -9` after a third of the steps; rayft starts it again by itself. After two thirds
the driver gets `kill -9`, and `rayft train --resume` goes on. Prints the steps that were lost (and done again) and the
largest difference between the two loss curves as JSON, and writes a picture of both.

The processes to kill must run on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayft import config
from rayft.runs.folder import RunFolder
from rayft.train.plots import plot_compare

PATIENCE = 3600
"""Seconds without the awaited step before the demonstration gives up."""


class Run:
    """A training run in processes of its own."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.command = [sys.executable, "-m", "rayft", "train", recipe, *overrides]
        resolved = config.load(recipe, overrides).recipe
        self.path = Path(resolved.storage, resolved.name)
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, mode: str) -> None:
        command = [*self.command, mode]
        print("$ rayft", *command[3:], flush=True)
        self.driver = subprocess.Popen(command)

    def finish(self) -> None:
        assert self.driver is not None
        if code := self.driver.wait():
            raise SystemExit(f"rayft train ended with exit code {code}")

    def created(self) -> str | None:
        """When the run that lies there began; None where there is none."""
        return RunFolder.open(self.path).record.created if (self.path / "run.json").exists() else None

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in RunFolder.open(self.path).events() if event["kind"] == kind]

    def step(self) -> int:
        """The last optimiser step that was logged."""
        rows = RunFolder.open(self.path).metrics()
        return rows[-1]["step"] if rows else 0

    def wait(self, condition: Callable[[], bool]) -> None:
        assert self.driver is not None
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.driver.poll() is not None:
                raise SystemExit(f"the run ended before it could be disturbed (exit code {self.driver.returncode})")
            if time.monotonic() > end:
                raise SystemExit(f"nothing happened for {PATIENCE} s")
            time.sleep(0.2)

    def kill_worker(self) -> None:
        pid = self.events("worker")[-1]["pid"]
        print(f"$ kill -9 {pid}    # a worker, after step {self.step()}", flush=True)
        os.kill(pid, signal.SIGKILL)

    def kill_driver(self) -> None:
        assert self.driver is not None
        print(f"$ kill -9 {self.driver.pid}    # the driver, after step {self.step()}", flush=True)
        self.driver.kill()
        self.driver.wait()


def disturb(run: Run) -> None:
    """Train with a worker killed after a third of the steps, and the driver after two thirds."""
    replaced = run.created()
    run.start("--overwrite")
    run.wait(lambda: run.created() not in (None, replaced) and bool(run.events("started")))
    steps = run.events("started")[0]["total_steps"]
    run.wait(lambda: run.step() >= steps // 3)
    run.kill_worker()
    run.wait(lambda: bool(run.events("restart")) and run.step() >= 2 * steps // 3)
    run.kill_driver()
    run.start("--resume")
    run.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "recipes" / "quickstart.yaml"
    parser.add_argument("recipe", nargs="?", default=str(default), help="recipe to train (default: the quickstart)")
    parser.add_argument("overrides", nargs="*", help="key=value, as for rayft train")
    parser.add_argument("--out", type=Path, help="picture to write (default: demo-kill.png in the recipe's storage)")
    args = parser.parse_args()
    recipe, overrides = args.recipe, args.overrides
    if "=" in recipe:
        recipe, overrides = str(default), [recipe, *overrides]

    name = config.load(recipe, overrides).recipe.name
    calm, disturbed = (Run(recipe, [*overrides, f"name={name}-{how}"]) for how in ("undisturbed", "killed"))
    calm.start("--overwrite")
    calm.finish()
    disturb(disturbed)

    curves = {
        "undisturbed": RunFolder.open(calm.path).metrics(),
        "a worker and the driver killed": RunFolder.open(disturbed.path).metrics(),
    }
    restarts = disturbed.events("restart")
    picture = args.out or calm.path.parent / "demo-kill.png"
    largest = plot_compare(curves, restarts, picture, title=f"{name}: kill -9 of a worker and of the driver")
    steps = [[row["step"] for row in rows if "loss" in row] for rows in curves.values()]
    if steps[0] != steps[1]:
        raise SystemExit("the two runs did not count the same steps")
    print(
        json.dumps(
            {
                "steps": len(steps[0]),
                "restarts": len(restarts),
                "lost_steps": [event["lost_steps"] for event in restarts],
                "largest_loss_difference": largest,
                "picture": str(picture),
            }
        )
    )


if __name__ == "__main__":
    main()
