"""The registry of adapter versions: what it takes, who answers, how one goes back, and what many writers do to it."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.config import Resolved
from rayft.errors import UsageError
from rayft.runs.folder import RunFolder
from rayft.runs.manifest import write_manifest
from rayft.runs.registry import Alias, Registry, default_folder
from rayft.runs.storage import locate
from rayft.runs.versions import Stage
from tests.runs.adapters import adapter_folder, raw_safetensors


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", who="anna")


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    """A registry in which ``bot`` has three versions, none of which answers."""
    for number in (1, 2, 3):
        registry.register("bot", adapter_folder(tmp_path / f"v{number}", float(number)))
    return registry


def state(alias: Alias) -> tuple[dict[int, float], dict[int, Stage]]:
    return dict(alias.weights), {version.number: version.stage for version in alias.versions}


def test_register(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", 1.0, rank=5)
    (folder / "optimizer.pt").write_bytes(b"pickled")
    (folder / "tokenization_evil.py").write_text("raise SystemExit")
    (folder / "base.json").write_text('{"base_hash": "b4"}')
    assert registry.aliases() == {} and not registry.folder.exists()
    before = time.time()
    made = registry.register("team/bot:v1", folder, note="first")
    assert (made.number, made.rank, made.stage, made.note, made.source) == (1, 5, "none", "first", str(folder))
    assert (made.base_name, made.base_hash, made.run, made.step) == ("some/base", "b4", None, None)
    assert before <= made.created <= time.time()
    copied = {file.name: file.read_bytes() for file in Path(made.path).iterdir()}
    names = ["adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja", "tokenizer.json"]
    assert sorted(copied) == names
    assert all(data == (folder / name).read_bytes() for name, data in copied.items())
    assert made.size == sum(map(len, copied.values()))
    alias = registry.alias("team/bot:v1")
    assert alias.versions == (made,) and alias.weights == {} and not alias.pinned and alias.strength == 1.0
    assert [(event.what, event.version, event.who) for event in alias.history] == [("register", 1, "anna")]
    assert Registry(registry.folder).aliases() == registry.aliases()


def test_a_copy_outlives_its_source_and_a_changed_source_is_another_version(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", 1.0)
    one = registry.register("bot", folder)
    adapter_folder(folder, 2.0)
    two = registry.register("bot", folder)
    shutil.rmtree(folder)
    assert (one.number, two.number) == (1, 2) and one.hash != two.hash
    assert Path(one.path, "adapter_model.safetensors").exists() and Path(two.path, "adapter_model.safetensors").exists()


def test_the_same_content_is_one_version(registry: Registry, tmp_path: Path) -> None:
    one = registry.register("bot", adapter_folder(tmp_path / "a", 1.0))
    same = adapter_folder(tmp_path / "b", 1.0)
    with pytest.raises(UsageError, match=r"R424.*version 1 of 'bot'"):
        registry.register("bot", same)
    assert registry.register("bot", same, allow_same=True) == one
    other = registry.register("other", same)
    assert other.path == one.path and other.number == 1
    assert len(list((registry.folder / "adapters").iterdir())) == 1
    (same / "chat_template.jinja").write_text("another")
    asked_otherwise = registry.register("bot", same)
    assert asked_otherwise.number == 2 and asked_otherwise.hash == one.hash and asked_otherwise.path != one.path


def test_one_version_is_in_production(three: Registry) -> None:
    assert state(three.promote("bot", 1)) == ({1: 1.0}, {1: "production", 2: "none", 3: "none"})
    assert state(three.promote("bot", 3)) == ({3: 1.0}, {1: "archived", 2: "none", 3: "production"})
    production = three.alias("bot").production
    assert production is not None and production.number == 3
    with pytest.raises(UsageError, match="R423: 'bot' has no version 4\n  hint: its versions: 1, 2, 3"):
        three.promote("bot", 4)
    made = three.register("bot", three.alias("bot").version(1).path, allow_same=True, stage="production")
    assert made.stage == "production" and state(three.alias("bot"))[0] == {1: 1.0}


def test_weigh(three: Registry) -> None:
    three.promote("bot", 1)
    assert state(three.weigh("bot", {1: 85, 2: 10, 3: 5})) == (
        {1: 0.85, 2: 0.1, 3: 0.05},
        {1: "production", 2: "staging", 3: "staging"},
    )
    assert three.weigh("bot", {1: 1, 2: 1, 3: 0}).weights == {1: 0.5, 2: 0.5}
    for wrong in ({1: -1.0}, {1: float("nan")}, {1: float("inf")}, {1: 0}, {}, {1: "x"}):
        with pytest.raises(UsageError, match="R427"):
            three.weigh("bot", wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="R423"):
        three.weigh("bot", {1: 1, 9: 1})
    assert three.alias("bot").weights == {1: 0.5, 2: 0.5}


def test_rollback_restores_stages_and_weights_exactly(three: Registry) -> None:
    steps = [
        three.promote("bot", 1),
        three.weigh("bot", {1: 2, 2: 1}),
        three.promote("bot", 2),
        three.promote("bot", 3),
    ]
    three.pin("bot", True)
    three.promote("bot", 3)  # changes nothing, so there is nothing to take back
    for before in (steps[2], steps[1], steps[0]):
        assert state(three.rollback("bot")) == state(before)
    with pytest.raises(UsageError, match="R429: nothing was served as 'bot' before"):
        three.rollback("bot")
    assert state(three.alias("bot")) == state(steps[0]) and three.alias("bot").pinned
    three.promote("bot", 2)
    assert state(three.rollback("bot")) == state(steps[0])
    with pytest.raises(UsageError, match="R429"):
        Registry(three.folder).rollback("bot")


def test_rollback_to_a_removed_version_is_refused(three: Registry) -> None:
    three.promote("bot", 1)
    three.promote("bot", 2)
    three.remove("bot", 1)
    with pytest.raises(UsageError, match=r"R429: version 1 of 'bot', which answered before, was removed"):
        three.rollback("bot")
    assert state(three.alias("bot")) == ({2: 1.0}, {2: "production", 3: "none"})


def test_history(three: Registry) -> None:
    three.promote("bot", 1)
    three.by("ben").weigh("bot", {1: 3, 2: 1})
    three.by(None).rollback("bot")
    three.strengthen("bot", 0.5)
    events = three.alias("bot").history[3:]
    assert [(event.what, event.who) for event in events] == [
        ("promote", "anna"),
        ("weigh", "ben"),
        ("rollback", None),
        ("strength", "anna"),
    ]
    promote, weigh, rollback, _ = events
    assert (promote.before.weights, promote.after.weights) == ({}, {1: 1.0})
    assert promote.before.stages == {1: "none", 2: "none", 3: "none"}
    assert weigh.before == promote.after == rollback.after and weigh.after == rollback.before
    assert [event.time for event in events] == sorted(event.time for event in events)
    for number in range(150):
        three.weigh("bot", {1: 1, 2: number + 1})
    assert len(three.alias("bot").history) == 157
    for number in range(60):
        three.weigh("bot", {1: 1, 3: number + 1})
    assert len(three.alias("bot").history) == 200


def test_remove(three: Registry, tmp_path: Path) -> None:
    three.promote("bot", 3)
    shared = three.register("other", tmp_path / "v1")
    with pytest.raises(UsageError, match="R428: version 3 of 'bot' gets 100% of the requests"):
        three.remove("bot", 3)
    second = three.alias("bot").version(2)
    three.remove("bot", 2)
    three.remove("bot", 1)
    assert not Path(second.path).exists() and Path(shared.path).exists()
    assert three.register("bot", tmp_path / "v2").number == 4, "a number is given once"
    three.remove("bot")
    assert set(three.aliases()) == {"other"}
    assert [copy.name for copy in (three.folder / "adapters").iterdir()] == [Path(shared.path).name]
    for wrong in (lambda: three.remove("bot"), lambda: three.remove("other", 7)):
        with pytest.raises(UsageError, match=r"R421|R423"):
            wrong()


def test_unknown_names_get_the_nearest(three: Registry) -> None:
    with pytest.raises(
        UsageError, match=r"R421: there is no adapter 'bott' in the registry\n  hint: did you mean bot\?"
    ):
        three.alias("bott")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../b", "../a", "/a", "a/", "a//b", "a/./b", "a\n", "a b", "a\\b", "é", "a@1", "x" * 201]
)
def test_names_that_are_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="R422"):
        registry.register(name, adapter_folder(tmp_path / "a", 1.0))
    assert not registry.folder.exists()


def test_names_never_become_paths(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", 1.0)
    names = ["Qwen/Qwen3-0.6B", "run:demo", "0", "a.b-c_d:e/f", "x" * 200]
    for name in names:
        registry.register(name, folder)
    assert set(registry.aliases()) == set(names)
    assert sorted(path.name for path in registry.folder.iterdir()) == [".lock", "adapters", "registry.json"]


def test_damaged_adapters_are_refused_and_leave_nothing(registry: Registry, tmp_path: Path) -> None:
    whole = adapter_folder(tmp_path / "whole", 1.0)
    data = (whole / "adapter_model.safetensors").read_bytes()
    config = json.loads((whole / "adapter_config.json").read_text())
    at = f"{'a' * 8}"
    headers = {
        "no object": b"[]",
        "no offsets": json.dumps({at: {"dtype": "F32", "shape": [1]}}).encode(),
        "offsets of text": json.dumps({at: {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}).encode(),
        "backwards": json.dumps({at: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode(),
        "shape": json.dumps({at: {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode(),
        "format": json.dumps({at: {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}).encode(),
        "deep": b"[" * 100_000,
        "none": b"{}",
    }
    weights = {"empty": b"", "short": data[:-1], "long": data + b"x", "header only": data[:60], "noise": b"\xff" * 200}
    weights |= {name: raw_safetensors(header, b"\0" * 4) for name, header in headers.items()}
    configs = {"no json": "{", "list": "[]", "no type": "{}", "ia3": '{"peft_type": "IA3"}', "deep": "[" * 100_000}
    configs |= {f"rank {rank}": json.dumps(config | {"r": rank}) for rank in (0, -1, "8", 2.5)}
    for number, broken in enumerate(weights.values()):
        folder = shutil.copytree(whole, tmp_path / f"weights{number}")
        (folder / "adapter_model.safetensors").write_bytes(broken)
        with pytest.raises(UsageError, match="R426") as caught:
            registry.register("bot", folder)
        assert str(folder) in caught.value.message
    for number, text in enumerate(configs.values()):
        folder = shutil.copytree(whole, tmp_path / f"config{number}")
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UsageError, match=r"R42[56]"):
            registry.register("bot", folder)
    pickled = shutil.copytree(whole, tmp_path / "pickled")
    os.rename(pickled / "adapter_model.safetensors", pickled / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"R425.*no adapter_model.safetensors(.|\n)*safe_serialization"):
        registry.register("bot", pickled)
    with pytest.raises(UsageError, match="R414"):
        registry.register("bot", tmp_path / "nowhere")
    assert registry.aliases() == {} and list((registry.folder / "adapters").iterdir()) == []


def test_adapters_of_runs(registry: Registry, resolved: Callable[..., Resolved], storage: str, tmp_path: Path) -> None:
    """On a file system and in buckets, from checkpoints and from the end; the run may go afterwards."""
    run = RunFolder.create(resolved(), "train")
    run.pin(base="base-hash")
    for step in (10, 20):
        local = adapter_folder(tmp_path / f"step{step}", float(step))
        (local / "optimizer.pt").write_bytes(b"state")
        write_manifest(local, step)
        locate(local).copy_to(run.location / "checkpoints" / f"checkpoint_{step}")
    with run.writing("adapter") as folder:
        adapter_folder(folder, 30.0)
    run.finish("finished", best_step=20)
    refs = ["run:demo@step-10", "run:demo@best", "run:demo", str(run.location / "adapter")]
    made = [registry.register("bot", ref, storage=storage, allow_same=True) for ref in refs]
    assert [(v.number, v.source, v.run, v.step, v.base_hash) for v in made] == [
        (1, "run:demo@step-10", "demo", 10, "base-hash"),
        (2, "run:demo@best", "demo", 20, "base-hash"),
        (3, "run:demo", "demo", None, "base-hash"),
        (3, "run:demo", "demo", None, "base-hash"),
    ]
    run.location.remove()
    for version in made:
        assert sorted(path.name for path in Path(version.path).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "tokenizer.json",
        ]
    with pytest.raises(UsageError, match="R410"):
        registry.register("bot", "run:demo", storage=storage)


def test_a_model_is_no_adapter(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"R425.*is a whole model"):
        registry.register("bot", tmp_path)


def test_a_damaged_registry_is_one_clear_error_and_stays_as_it_is(three: Registry, tmp_path: Path) -> None:
    file = three.folder / "registry.json"
    whole = json.loads(file.read_text())
    text = file.read_text()
    damaged = [
        "",
        text[:-3],
        text[: text.rindex("}}")],
        text.replace('"name":"bot"', '"name":"bat"'),
        text.replace('"number":2', '"number":"two"'),
        text.replace('"pinned":false', '"pinned":' + "[" * 100_000),
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps(whole | {"aliases": {"bot": {"name": 3}}}),
        json.dumps(whole | {"schema": 2}),
    ]
    for text in damaged:
        file.write_text(text)
        changes = (
            lambda: three.promote("bot", 1),
            lambda: three.register("new", tmp_path / "v1"),
            lambda: three.remove("bot"),
            lambda: Registry(three.folder).alias("bot"),
        )
        for change in changes:
            with pytest.raises(UsageError, match="R420"):
                change()
        assert file.read_text() == text
    file.write_text(json.dumps(whole, indent=4))  # laid out by somebody else
    assert three.alias("bot").version(3).number == 3


def test_places_that_are_refused(tmp_path: Path) -> None:
    for bucket in ("s3://bucket/registry", default_folder("gs://bucket/runs")):
        with pytest.raises(UsageError, match=r"R405.*bucket(.|\n)*serve.registry"):
            Registry(bucket)
    folder = adapter_folder(tmp_path / "a", 1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="R430"):
        Registry(tmp_path / "run").register("bot", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="R401"):
        Registry(tmp_path / "file").register("bot", folder)
    assert default_folder(str(tmp_path)) == str(tmp_path / "registry") and default_folder("x", "y") == "y"


def test_a_registry_may_move(three: Registry, tmp_path: Path) -> None:
    three.promote("bot", 1)
    moved = Registry(shutil.move(three.folder, tmp_path / "elsewhere"))
    version = moved.alias("bot").version(1)
    assert version.path.startswith(str(tmp_path / "elsewhere")) and Path(version.path, "tokenizer.json").exists()


def test_readers_see_every_change_and_pay_little_without_one(three: Registry) -> None:
    reader = Registry(three.folder)
    for number in range(60):  # faster than the clock of the file system ticks, and of equal size
        three.weigh("bot", {1: 1, 2: 1} if number % 2 else {1: 1, 3: 1})
        assert reader.alias("bot").weights == three.alias("bot").weights == {1: 0.5, 2 + (number + 1) % 2: 0.5}
    assert reader.aliases() is reader.aliases(), "nothing is parsed again"
    three.register("other", three.alias("bot").version(1).path)
    before = reader.alias("bot")
    three.promote("other", 1)
    assert reader.alias("other").weights == {1: 1.0} and reader.alias("bot") is before, "only what changed is"
    times = []
    for _ in range(200):
        start = time.perf_counter()
        reader.alias("bot")
        times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 200e-6


def test_a_change_that_leaves_size_and_time_is_seen(three: Registry) -> None:
    """Two writings within one tick of the file system's clock, the second one in a file of the same number."""
    three.weigh("bot", {1: 1, 2: 1})
    file = three.folder / "registry.json"
    before, stat = file.read_bytes(), file.stat()
    edition = json.loads(before)["edition"].encode()
    after = before.replace(b'"2":0.5', b'"3":0.5').replace(edition, edition[::-1])
    assert three.alias("bot").weights == {1: 0.5, 2: 0.5} and len(after) == len(before) and edition != edition[::-1]
    with open(file, "r+b") as same:
        same.write(after)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert three.alias("bot").weights == {1: 0.5, 3: 0.5}


def test_partial_copies_are_invisible(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an adapter is copied, and after it failed, nothing under its final name can be seen."""
    folder = adapter_folder(tmp_path / "a", 1.0)
    seen: list[list[str]] = []
    copy = shutil.copyfileobj

    def slow(*args: object) -> None:
        seen.append([path.name for path in (registry.folder / "adapters").iterdir() if not path.name.startswith(".")])
        if len(seen) == 4:
            raise OSError(28, "No space left on device")
        copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    with pytest.raises(UsageError, match=r"R426.*No space left"):
        registry.register("bot", folder)
    assert seen == [[]] * 4 and list((registry.folder / "adapters").iterdir()) == [] and registry.aliases() == {}
    monkeypatch.undo()
    left = registry.folder / "adapters" / ".draft-killed"
    left.mkdir()
    registry.register("bot", folder)
    assert left.exists(), "it may be somebody's who copies now"
    os.utime(left, (0, 0))
    registry.register("other", folder)
    assert not left.exists()


def test_a_copy_is_not_freed_under_a_registration(registry: Registry, tmp_path: Path) -> None:
    """Names that share one content come and go in two threads: no version ever lacks its copy."""
    folder = adapter_folder(tmp_path / "a", 1.0)
    problems: list[object] = []

    def churn(name: str) -> None:
        mine = Registry(registry.folder)
        try:
            for _ in range(30):
                version = mine.register(name, folder)
                if not Path(version.path, "adapter_config.json").exists():
                    problems.append(name)
                mine.remove(name)
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=churn, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and registry.aliases() == {} and list((registry.folder / "adapters").iterdir()) == []
