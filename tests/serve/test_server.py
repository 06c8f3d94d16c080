"""The whole server on Ray Serve: two replicas behind one address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from rayft.errors import UsageError
from rayft.models.identity import base_hash
from rayft.serve import Server, deploy
from rayft.serve.job import Content
from tests.inference.oracle import Reference

PROMPTS = [tuple(range(5, 8 + number)) for number in range(8)]
TOKENS = 12


def recipe(tmp_path: Path, folder: str, **serve: Any) -> dict[str, Any]:
    return {
        "name": "served",
        "storage": str(tmp_path / "runs"),
        "model": {"base": folder, "dtype": "fp32"},
        "data": {"train": "none"},
        "scale": {"cpus_per_worker": 1},
        "serve": {"port": 0, **serve},
    }


@pytest.fixture(scope="module")
def sharpened_folder(base: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base of `peft` as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(
    ray_cluster: str,
    sharpened_folder: str,
    contents: dict[str, Content],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    named = {name: contents[name].path for name in ("anna", "hugo")}
    roots = [str(Path(contents["anna"].path).parent)]
    path = tmp_path_factory.mktemp("server")
    with deploy(recipe(path, sharpened_folder, replicas=2, adapters=named, roots=roots, log_requests=False)) as served:
        yield served


@pytest.fixture(scope="module")
def expected(peft: Reference, tokenizer: Any) -> Callable[[int, str | None], str]:
    """``expected(prompt number, adapter)``: the text of stock PEFT's answer."""
    known: dict[tuple[int, str | None], str] = {}

    def answer(number: int, adapter: str | None) -> str:
        if (number, adapter) not in known:
            ids = peft.answer(PROMPTS[number], adapter, TOKENS)
            known[number, adapter] = tokenizer.decode(ids, skip_special_tokens=True)
        return known[number, adapter]

    return answer


def asked(number: int, model: str, **fields: Any) -> dict[str, Any]:
    extra = {"extra_body": {"ignore_eos": True}}
    return {"model": model, "prompt": list(PROMPTS[number]), "max_tokens": TOKENS, "temperature": 0, **extra, **fields}


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)


def replicas() -> list[psutil.Process]:
    """The processes of engines on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:rayft-") and title.partition(" ")[0].rstrip(":").endswith(":engines"):
            found.append(process)
    return found


def test_clients_get_stock_pefts_answers(server: Server, expected: Callable[..., str], sharpened_folder: str) -> None:
    client = client_of(server)
    base = server.models[0]
    assert server.models == ("tiny", "anna", "hugo")
    assert {model.id for model in client.models.list()} == set(server.models)

    def ask(job: tuple[int, str, bool]) -> str:
        number, model, stream = job
        if not stream:
            return client.completions.create(**asked(number, model)).choices[0].text
        chunks = client.completions.create(**asked(number, model), stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    jobs = [(n, model, bool(n % 2)) for n in range(len(PROMPTS)) for model in server.models]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, jobs))
    for (number, model, _), answer in zip(jobs, answers, strict=True):
        assert answer == expected(number, None if model == base else model)
    with pytest.raises(openai.NotFoundError, match="anna, hugo"):
        client.completions.create(**asked(0, "nobody"))
    with pytest.raises(openai.BadRequestError, match="R812"):
        client.completions.create(**asked(0, base) | {"max_tokens": 100_000})
    info = httpx.get(f"{server.url}/model_info").json()
    assert info["content"] == base_hash(sharpened_folder)


def test_a_swap_under_load_fails_nobody(
    server: Server, contents: dict[str, Content], expected: Callable[..., str]
) -> None:
    done = threading.Event()
    answers: Counter[str] = Counter()
    failed: list[Exception] = []

    def load(number: int) -> None:
        client = client_of(server)
        while not done.is_set():
            try:
                answers[client.completions.create(**asked(0, "swapped")).choices[0].text] += 1
            except Exception as error:
                failed.append(error)

    first = {"name": "swapped", "source": contents["bert"].path}
    assert httpx.post(f"{server.url}/v1/adapters", json=first, timeout=180).status_code == 200
    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    old, new = (expected(0, name) for name in ("bert", "carl"))
    wait_for(lambda: answers[old] > 4)
    second = {"name": "swapped", "source": contents["carl"].path, "promote": True}
    assert httpx.post(f"{server.url}/v1/adapters", json=second, timeout=180).status_code == 200
    time.sleep(0.1)
    swapped = answers[old]
    wait_for(lambda: answers[new] > 20)
    assert answers[old] <= swapped + len(threads)  # what was in flight
    assert httpx.post(f"{server.url}/v1/adapters/swapped/rollback", timeout=180).status_code == 200
    back = answers[old]
    wait_for(lambda: answers[old] > back + len(threads))
    done.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(answers) == {old, new}


def test_a_killed_replica_loses_nothing_that_was_not_streamed(server: Server, expected: Callable[..., str]) -> None:
    client = client_of(server)
    assert httpx.post(f"{server.url}/v1/adapters/anna/pin", json={"pinned": True}, timeout=180).status_code == 200
    wait_for(lambda: len(replicas()) == 2)
    victim = replicas()[0]
    with ThreadPoolExecutor(6) as pool:
        begin = time.monotonic()
        jobs = [(number % len(PROMPTS), ("anna", "hugo")[number % 2]) for number in range(120)]
        futures = [
            pool.submit(lambda job=job: client.completions.create(**asked(*job)).choices[0].text) for job in jobs
        ]
        wait_for(lambda: sum(future.done() for future in futures) > 20)
        os.kill(victim.pid, signal.SIGKILL)
        answers = [future.result() for future in futures]
    assert time.monotonic() - begin < 180
    assert [expected(*job) for job in jobs] == answers
    wait_for(lambda: len(replicas()) == 2 and victim.pid not in {process.pid for process in replicas()}, 180)

    def everywhere() -> bool:
        return httpx.get(f"{server.url}/health", timeout=30).status_code == 200

    wait_for(everywhere)
    assert client.completions.create(**asked(3, "anna")).choices[0].text == expected(3, "anna")


def test_the_command_line(
    server: Server, ray_cluster: str, tiny_model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()  # an application of a cluster answers under its address alone
    monkeypatch.setenv("RAYFT_HOME", str(tmp_path / "home"))
    words = [f"model.base={tiny_model_folder}", f"storage={tmp_path}/runs", "scale.cpus_per_worker=1"]

    def rayft(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rayft", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=Path(__file__).parents[2])

    port = int(server.url.rpartition(":")[2])
    started = rayft("serve", *words, f"serve.port={port}", "--detach")
    assert started.returncode == 0, started.stderr
    assert f"http://127.0.0.1:{port}/v1" in started.stdout
    assert "ok" in rayft("serve", "status").stdout
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == Path(tiny_model_folder).name
    stopped = rayft("serve", "stop")
    assert stopped.returncode == 0 and "stopped" in stopped.stdout
    assert "no server" in rayft("serve", "status").stdout
    refused = rayft("serve", *words, "serve.host=0.0.0.0")
    assert refused.returncode == 2 and refused.stderr.startswith("R863")
    nothing = rayft("serve", "stop", "nobody")
    assert nothing.returncode == 2 and nothing.stderr.startswith("R865")


def test_what_cannot_be_served_together(
    contents: dict[str, Content], sharpened_folder: str, tmp_path: Path, tiny_model_factory: Callable[..., str]
) -> None:
    with pytest.raises(UsageError, match="R863"):
        deploy(recipe(tmp_path, sharpened_folder, host="0.0.0.0"))
    with pytest.raises(UsageError, match="R844"):
        deploy(recipe(tmp_path, sharpened_folder, api_keys=str(tmp_path / "keys.json")))
    other = Path(tiny_model_factory(hidden_size=32))
    trained_elsewhere = tmp_path / "adapter"
    shutil.copytree(contents["anna"].path, trained_elsewhere)
    (trained_elsewhere / "base.json").write_text(json.dumps({"base": str(other), "base_hash": base_hash(other)}))
    with pytest.raises(UsageError, match=r"R860: far was trained on other base weights"):
        deploy(recipe(tmp_path, sharpened_folder, adapters={"far": str(trained_elsewhere)}))
    with pytest.raises(UsageError, match="R861"):
        deploy([str(other), str(trained_elsewhere)])


def wait_for(condition: Callable[[], bool], patience: float = 120) -> None:
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
