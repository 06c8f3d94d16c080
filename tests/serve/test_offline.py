"""`generate`: answers are those of the model alone, in the order of the input, and none is computed twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rayft.cli import app
from rayft.errors import RunFailed, UsageError
from rayft.inference.generator import Prompt, Sampling
from rayft.inference.hf import HFGenerator, active_adapter
from rayft.inference.request import SamplingParams
from rayft.models.save import load_trained
from rayft.serve.offline import generate
from rayft.serve.offline_workers import Lost, pump
from rayft.serve.render import Renderer

HERE = ("scale.workers=0", "model.dtype=fp32")
SHORT = SamplingParams(max_new_tokens=8)


@pytest.fixture(scope="module")
def adapter(tiny_model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapters") / "orders"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return str(folder)


def written(file: Path, lines: Sequence[Any]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "messages": [{"role": "user", "content": f"Order {i} pizzas"}]} for i in range(count)]


def test_answers_are_those_of_the_model_alone(adapter: str, tmp_path: Path) -> None:
    lines = questions(10)
    for line in lines[::2]:
        line["adapter"] = None
    lines[3] = {"id": 3, "prompt": "Please order", "metadata": {"row": 3}, "max_tokens": 5}
    out = tmp_path / "out.jsonl"
    result = generate(adapter, HERE, input=written(tmp_path / "in.jsonl", lines), output=str(out), defaults=SHORT)
    answers = read(out)
    assert [answer["id"] for answer in answers] == [line["id"] for line in lines]
    model, tokenizer = load_trained(adapter, dtype="fp32")
    renderer, generator = Renderer(tokenizer), HFGenerator(model, tokenizer)
    for line, answer in zip(lines, answers, strict=True):
        ids = tokenizer(line["prompt"])["input_ids"] if "prompt" in line else _ids(renderer, line)
        name = None if line.get("adapter", "orders") is None else active_adapter(model)
        sampling = Sampling(max_new_tokens=line.get("max_tokens", 8))
        (alone,) = generator.generate([Prompt(tuple(ids), name)], sampling)
        assert answer["text"] == alone.text
        assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": len(alone.ids)}
        assert answer["adapter"] == line.get("adapter", "orders")
    assert answers[3]["metadata"] == {"row": 3}
    assert (result.answered, result.skipped, result.failed) == (10, 0, 0)
    assert result.completion_tokens == sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out.jsonl"]


def _ids(renderer: Renderer, line: Any) -> tuple[int, ...]:
    from rayft.serve.job import Conversation

    return renderer.ids(Conversation(tuple(line["messages"])))


def test_only_what_is_new_is_computed(adapter: str, tmp_path: Path) -> None:
    lines, out = questions(6), tmp_path / "out.jsonl"

    def run(**defaults: Any) -> tuple[int, int]:
        file = written(tmp_path / "in.jsonl", lines)
        sampling = SamplingParams(**({"max_new_tokens": 4} | defaults))
        result = generate(adapter, HERE, input=file, output=str(out), defaults=sampling)
        assert [line["id"] for line in read(out)] == [line["id"] for line in lines]
        return result.answered, result.skipped

    assert run() == (6, 0)
    first = read(out)
    assert run() == (0, 6) and read(out) == first
    lines.insert(2, {"id": "new", "prompt": "Hello"})
    lines[0]["messages"][0]["content"] = "Something else"
    lines.pop()
    assert run() == (2, 4)
    assert run(max_new_tokens=5) == (6, 0)


def test_what_is_wrong_with_a_line_stands_in_its_answer(adapter: str, tmp_path: Path) -> None:
    lines = [
        {"id": 1, "prompt": "Hello"},
        {"id": 2, "prompt": "Hello " * 3000, "metadata": "long"},
        {"id": 3, "prompt": "Hello", "grammar": {"kind": "regex", "value": "("}},
        {"id": 4, "messages": [{"role": "bishop", "content": "x"}]},
        {"id": 5, "prompt": "Hello", "grammar": {"kind": "choice", "value": ["yes", "no"]}},
        {
            "id": 6,
            "messages": [{"role": "user", "content": "now"}],
            "tools": [{"type": "function", "function": {"name": "clock"}}],
            "tool_choice": "function:clock",
            "max_tokens": 100,
        },
    ]
    file, out = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    words = ["generate", adapter, *HERE, "--input", file, "--output", str(out), "--tokens", "20", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    answers = read(out)
    assert [answer.get("error", {}).get("id") for answer in answers] == [None, "R812", "R817", "R818", None, None]
    assert answers[1]["metadata"] == "long"
    assert answers[4]["text"] in ("yes", "no")
    (call,) = answers[5]["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": "{}"} and answers[5]["finish_reason"] == "tool_calls"
    written(tmp_path / "in.jsonl", [lines[0], {**lines[1], "prompt": "short"}, *lines[4:]])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["skipped"] == 3 and json.loads(result.stdout)["answered"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "JSON object"),
        ("{}", "prompt or messages"),
        ('{"prompt": "a", "messages": []}', "prompt or messages"),
        ('{"prompt": 1}', "a prompt is"),
        ('{"messages": "a"}', "list of objects"),
        ('{"prompt": "a", "temperatur": 1}', "temperatur"),
        ('{"prompt": "a", "temperature": "warm"}', "temperature"),
        ('{"prompt": "a", "top_p": 2}', "top_p"),
        ('{"prompt": "a", "max_tokens": 0}', "max_new_tokens"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos"),
        ('{"prompt": "a", "adapter": "nobody"}', "orders"),
        ('{"prompt": "a", "grammar": {"kind": "poem"}}', "grammar"),
        ('{"prompt": "a", "id": [1]}', "an id is"),
        ('{"prompt": "a", "id": "q1"}', "comes twice"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_computed(adapter: str, tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a", "id": "q1"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=f"line 3: .*{reason}") as error:
        generate(adapter, HERE, input=str(file), output=str(tmp_path / "out.jsonl"))
    assert error.value.id in ("R870", "R871")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_something_else_is_not_overwritten(adapter: str, tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", questions(1))
    for text in ('{"mine": 1}\n', "poem\n"):
        (tmp_path / "out.jsonl").write_text(text)
        with pytest.raises(UsageError, match="R872"):
            generate(adapter, HERE, input=file, output=str(tmp_path / "out.jsonl"))
        assert (tmp_path / "out.jsonl").read_text() == text
    with pytest.raises(UsageError, match="R871"):
        generate(adapter, HERE, input=str(tmp_path / "none.jsonl"), output=str(tmp_path / "new.jsonl"))


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on(adapter: str, tmp_path: Path, how: signal.Signals) -> None:
    lines, out = questions(200), tmp_path / "out.jsonl"
    words = ["generate", adapter, *HERE, "--input", written(tmp_path / "in.jsonl", lines), "--output", str(out)]
    words += ["--tokens", "64", "serve.max_num_seqs=16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rayft", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell lets its background jobs ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), errors
    if how == signal.SIGINT:
        assert b"R873" in errors and b"same command" in errors
    assert not out.exists()
    before = {line["id"]: line for line in read(partial)[:-1]}
    assert 0 < len(before) < len(lines)
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    answers = read(out)
    assert [answer["id"] for answer in answers] == [line["id"] for line in lines]
    assert json.loads(result.stdout)["skipped"] >= len(before)
    assert all(before.get(answer["id"], answer) == answer for answer in answers)
    assert not partial.exists()


def test_what_a_lost_worker_had_goes_to_others() -> None:
    shards: list[Any] = [[number] for number in range(40)]
    taken: list[int] = []

    async def steady(items: Any) -> list[Any]:
        await asyncio.sleep(0.001)
        return list(items)

    async def dying(items: Any) -> list[Any]:
        await asyncio.sleep(0.002)
        if len(taken) > 5:
            raise Lost("out of memory")
        return list(items)

    asyncio.run(pump([steady, dying], shards, taken.extend))
    assert sorted(taken) == list(range(40))
    with pytest.raises(RunFailed, match=r"(?s)R874.*out of memory"):
        asyncio.run(pump([dying, dying], shards, taken.extend))


@pytest.mark.long
def test_workers_on_a_cluster_and_one_that_is_killed(ray_cluster: str, adapter: str, tmp_path: Path) -> None:
    import threading

    lines, out = questions(120), tmp_path / "out.jsonl"
    alone = tmp_path / "alone.jsonl"
    file = written(tmp_path / "in.jsonl", lines)
    defaults = SamplingParams(max_new_tokens=48)
    generate(adapter, HERE, input=file, output=str(alone), defaults=defaults)
    killed: list[int] = []

    def kill() -> None:
        partial = tmp_path / "out.jsonl.partial"
        while not (partial.exists() and partial.stat().st_size):
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True) + list(psutil.process_iter()):
            if not killed and process.name().startswith("ray::Worker"):
                killed.append(process.pid)
                process.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = generate(
        adapter,
        ["scale.workers=2", "model.dtype=fp32", "serve.max_num_seqs=8"],
        input=file,
        output=str(out),
        defaults=defaults,
    )
    thread.join(timeout=60)
    assert killed
    assert (result.answered, result.failed) == (120, 0)
    assert read(out) == read(alone)
