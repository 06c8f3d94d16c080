"""The registry among several processes, and against a model of it that is a plain dictionary."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import UsageError
from rayft.runs.registry import Registry
from tests.runs.adapters import adapter_folder

WRITER = """
import sys
from rayft.runs.registry import Registry
folder, me, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
registry = Registry(folder, who=me)
print("ready", flush=True)
for number in range(1, times + 1):
    registry.weigh("shared", {1: 1 + number, 2: 1} if me == "one" else {1: 1, 2: 1 + number})
    registry.strengthen(me, 1 + number)
"""


def start(registry: Registry, me: str, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(registry.folder), me, str(times)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Names that the writers change: ``shared``, and one of each writer's own."""
    registry = Registry(tmp_path / "registry")
    for name in ("shared", "one", "two"):
        for number in (1, 2):
            registry.register(name, adapter_folder(tmp_path / f"v{number}", float(number)))
    return registry


@pytest.mark.long
def test_two_writers_lose_nothing(registry: Registry) -> None:
    """Each of two processes writes 2 x 100 times; a reader here meets whole files only."""
    writers = [start(registry, me, 100) for me in ("one", "two")]
    while any(writer.poll() is None for writer in writers):
        shares = Registry(registry.folder).alias("shared").weights
        assert not shares or sum(shares.values()) == pytest.approx(1.0)
    assert [writer.returncode for writer in writers] == [0, 0]
    aliases = registry.aliases()
    assert aliases["one"].strength == aliases["two"].strength == 101.0
    history = aliases["shared"].history
    assert [event.what for event in history] == ["weigh"] * 200  # as many are kept: the registrations are forgotten
    assert [[event.who for event in history].count(me) for me in ("one", "two")] == [100, 100]
    assert all(before.after == after.before for before, after in pairwise(history))
    for name in ("one", "two"):
        own = aliases[name].history
        assert [event.who for event in own if event.what == "strength"] == [name] * 100


@pytest.mark.long
def test_two_processes_register_versions_of_one_name(registry: Registry, tmp_path: Path) -> None:
    folders = [[adapter_folder(tmp_path / f"{at + n}", at + n) for n in range(40)] for at in (10, 60)]
    code = (
        "import sys\nfrom rayft.runs.registry import Registry\n"
        "print('ready', flush=True), sys.stdin.read()\n"
        "for folder in sys.argv[2:]: Registry(sys.argv[1]).register('bot', folder)"
    )
    command = [sys.executable, "-c", code, str(registry.folder)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen([*command, *map(str, mine)], **pipes) for mine in folders]
    assert [writer.stdout.readline() for writer in writers] == [b"ready\n"] * 2
    for writer in writers:
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0, 0]
    versions = registry.alias("bot").versions
    assert [version.number for version in versions] == list(range(1, 81))
    for mine in folders:
        assert [v.source for v in versions if Path(v.source) in mine] == [str(folder) for folder in mine]
    assert all(Path(version.path, "adapter_model.safetensors").is_file() for version in versions)


@pytest.mark.long
def test_a_killed_writer_leaves_a_whole_registry(registry: Registry) -> None:
    for attempt in range(6):
        writer = start(registry, "one", 10_000)
        time.sleep(0.05 + 0.037 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert set(Registry(registry.folder).aliases()) == {"shared", "one", "two"}
    assert registry.weigh("shared", {1: 12345, 2: 1}).weights[1] == 12345 / 12346, "the lock died with its process"
    assert sorted(path.name for path in registry.folder.iterdir()) == [".lock", "adapters", "registry.json"]
    json.loads((registry.folder / "registry.json").read_text())


class Model:
    """What the registry should say, kept as plainly as possible."""

    def __init__(self) -> None:
        self.content: dict[int, int] = {}
        self.stages: dict[int, str] = {}
        self.weights: dict[int, float] = {}
        self.past: list[tuple[dict[int, str], dict[int, float]]] = []
        self.count = 0

    def register(self, content: int) -> bool:
        if content in self.content.values():
            return False
        self.count += 1
        self.content[self.count], self.stages[self.count] = content, "none"
        return True

    def promote(self, number: int) -> bool:
        if number not in self.content:
            return False
        stages = {n: "archived" if stage == "production" else stage for n, stage in self.stages.items()}
        self._become(stages | {number: "production"}, {number: 1.0})
        return True

    def weigh(self, weights: dict[int, int]) -> bool:
        if not set(weights) <= set(self.content) or not sum(weights.values()):
            return False
        shares = {n: weight / sum(weights.values()) for n, weight in weights.items() if weight}
        back = {n: "staging" for n in shares if self.stages[n] in ("none", "archived")}
        self._become(self.stages | back, shares)
        return True

    def rollback(self) -> bool:
        if not self.past or not self.past[-1][1] or not set(self.past[-1][1]) <= set(self.content):
            return False
        stages, self.weights = self.past.pop()
        self.stages |= {n: stage for n, stage in stages.items() if n in self.content}
        return True

    def remove(self, number: int) -> bool:
        if number not in self.content or number in self.weights:
            return False
        del self.content[number], self.stages[number]
        return True

    def _become(self, stages: dict[int, str], weights: dict[int, float]) -> None:
        if (stages, weights) != (self.stages, self.weights):
            self.past.append((self.stages, self.weights))
            self.stages, self.weights = stages, weights


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_random_walk_against_a_plain_model(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    registry, model, done = Registry(tmp_path / "registry"), Model(), {"agree": 0, "refuse": 0}
    contents = [adapter_folder(tmp_path / str(value), float(value)) for value in range(6)]
    assert registry.register("bot", contents[0]).number == 1 and model.register(0)
    for _ in range(120):
        number = draw.randint(1, model.count + 1)
        weights = {draw.randint(1, model.count): draw.randint(0, 3) for _ in range(3)}
        content = draw.randrange(6)
        calls: list[tuple[Any, Any]] = [
            (lambda c=content: registry.register("bot", contents[c]), lambda c=content: model.register(c)),
            (lambda n=number: registry.promote("bot", n), lambda n=number: model.promote(n)),
            (lambda w=weights: registry.weigh("bot", w), lambda w=weights: model.weigh(w)),
            (lambda: registry.rollback("bot"), lambda: model.rollback()),
            (lambda n=number: registry.remove("bot", n), lambda n=number: model.remove(n)),
        ]
        real, plain = draw.choice(calls)
        expected = plain()
        try:
            real()
            assert expected
        except UsageError as refused:
            assert not expected and refused.id in ("R423", "R424", "R427", "R428", "R429"), refused
        done["agree" if expected else "refuse"] += 1
        alias = registry.alias("bot")
        assert alias.weights == pytest.approx(model.weights)
        assert {version.number: version.stage for version in alias.versions} == model.stages
        assert [version.stage for version in alias.versions].count("production") <= 1
        assert {int(Path(version.source).name) for version in alias.versions} == set(model.content.values())
        copies = {path.name for path in (registry.folder / "adapters").iterdir()}
        assert copies == {Path(version.path).name for version in alias.versions}
    assert min(done.values()) > 15, "the walk does both"
