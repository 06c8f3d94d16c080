"""Health, metrics, summaries, logs and the plain routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from rayft.config.serve import Serve
from rayft.serve import keys, replies
from rayft.serve.backend import Backend, ModelCard, ReplicaState
from rayft.serve.journal import Journal, Texts
from rayft.serve.measure import OTHER, Measure
from rayft.serve.record import Record
from rayft.serve.summary import distribution, summary
from tests.serve.api.conftest import World

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Answer"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


@pytest.fixture
def fresh(server_of: Callable[..., str], tmp_path: Path) -> Iterator[httpx.Client]:
    """A server whose counters start at zero, with its logs in ``tmp_path``."""
    with httpx.Client(base_url=server_of(folder=tmp_path), timeout=30) as http:
        yield http


def samples(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """(name, values of the labels but the base's name...) -> value."""
    response = http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for label, value in sample.labels.items() if label != "model_name")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def lines_of(folder: Path, wanted: int) -> list[dict[str, Any]]:
    """A client may have its answer before the line is written."""
    end = time.monotonic() + 10
    while len(text := (folder / "requests.jsonl").read_text().splitlines()) < wanted:
        assert time.monotonic() < end
        time.sleep(0.01)
    return [json.loads(line) for line in text]


def test_counters_summary_and_log_are_the_sum_of_usage(fresh: httpx.Client, tmp_path: Path) -> None:
    usage: Counter[tuple[str, str]] = Counter()
    asked: list[dict[str, Any]] = [
        {"model": "anna"}, {"model": "anna", "n": 3}, {"model": "bert", "stream": True}, {"seed": 3},
        {"model": "bert", "stream": True, "n": 2}, {"model": "nobody"}, {"max_tokens": 9999}, {"max_tokens": 9},
    ]  # fmt: skip
    for fields in asked:
        body = ASK | fields
        if body.get("stream"):
            text = fresh.post(CHAT, json=body | {"stream_options": {"include_usage": True}}).text
            answer = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
        else:
            answer = fresh.post(CHAT, json=body).json()
        for name, tokens in answer.get("usage", {}).items():
            if name != "prompt_tokens_details":
                usage[body["model"], name] += tokens
    made = fresh.post("/generate", json={"prompt": "Sure", "adapter": "carl", "max_length": 5}).json()
    usage["carl", "prompt_tokens"] += made["input_tokens"]
    usage["carl", "completion_tokens"] += made["output_tokens"]
    texts = fresh.post("/v1/completions", json={"model": "carl", "prompt": ["Sure", "What is"], "n": 2}).json()["usage"]
    usage["carl", "prompt_tokens"] += texts["prompt_tokens"]
    usage["carl", "completion_tokens"] += texts["completion_tokens"]

    lines = lines_of(tmp_path, len(asked) + 2)
    found = samples(fresh)
    for name in ("tiny", "anna", "bert", "carl"):
        for metric, field in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "completion_tokens")):
            assert found[f"vllm:{metric}_total", name] == usage[name, field] > 0
            assert sum(line[field] for line in lines if line["name"] == name) == usage[name, field]
    assert (
        found["vllm:request_success_total", "anna", "length"]
        + found.get(("vllm:request_success_total", "anna", "stop"), 0)
        == 1 + 3
    )
    assert found["vllm:time_to_first_token_seconds_count", "bert"] == 2
    assert found["vllm:e2e_request_latency_seconds_count", "tiny"] == 2
    assert found["vllm:request_queue_time_seconds_count", "tiny"] == 2
    assert found["vllm:request_queue_time_seconds_sum", "tiny"] < found["vllm:e2e_request_latency_seconds_sum", "tiny"]
    assert found["rayft:request_errors_total", "404"] == found["rayft:request_errors_total", "400"] == 1
    assert found["vllm:num_requests_running", "0"] == 0
    assert 'vllm:prompt_tokens_total{adapter="anna",model_name="tiny"}' in fresh.get("/metrics").text

    told = fresh.get("/performance_summary").json()
    replies.Summary.model_validate(told)
    assert told == json.loads(json.dumps(summary(lines)))
    assert fresh.get("/performance_summary?window=3").json() == json.loads(json.dumps(summary(lines[-3:])))
    assert told["requests"] == len(asked) + 2 and told["errors"] == 2
    assert not any("Answer" in line for line in (tmp_path / "requests.jsonl").read_text().splitlines())
    assert not (tmp_path / "texts.jsonl").exists()
    for bad in ("0", "-1", "x", "100000"):
        assert fresh.get(f"/performance_summary?window={bad}").json()["error"]["param"] == "window"


def test_a_hang_up_is_recorded_and_not_billed(fresh: httpx.Client, tmp_path: Path) -> None:
    endless = ASK | {"stream": True, "max_tokens": 1900, "ignore_eos": True}
    with fresh.stream("POST", CHAT, json=endless) as response:
        lines = response.iter_lines()
        next(lines)
    (line,) = lines_of(tmp_path, 1)
    assert (line["status"], line["error"], line["completion_tokens"]) == (499, "R837", 0)
    assert line["first_token"] is not None
    assert ("vllm:generation_tokens_total", "tiny") not in samples(fresh)


def test_metrics_say_which_adapters_answer_now(fresh: httpx.Client) -> None:
    endless = ASK | {"stream": True, "max_tokens": 1900, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        for model in ("carl", "anna", "tiny"):
            response = stack.enter_context(fresh.stream("POST", CHAT, json=endless | {"model": model}))
            assert response.status_code == 200
        text = fresh.get("/metrics").text
    assert 'running_lora_adapters="anna,carl"' in text and 'max_lora="32"' in text


class Elsewhere:
    """A backend whose engine is not there."""

    def __init__(self, card: Any) -> None:
        self._card = card

    async def card(self) -> ModelCard:
        return await self._card()

    async def states(self) -> list[ReplicaState]:
        raise ConnectionError("gone")


def test_health(http: httpx.Client, server_of: Callable[..., str], world: World) -> None:
    assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").json() == {"status": "ready"}

    async def never() -> ModelCard:
        await asyncio.Event().wait()
        raise AssertionError

    for card in (never, world.replica.card):
        url = server_of(backend=Elsewhere(card))
        for path in ("/health", "/ready"):
            response = httpx.get(f"{url}{path}")
            assert response.status_code == 503 and response.json()["error"]["code"] == "R838"
            assert int(response.headers["retry-after"]) >= 1
    loading: Backend = Elsewhere(never)  # type: ignore[assignment]
    assert httpx.post(f"{server_of(backend=loading)}{CHAT}", json=ASK).status_code == 503


def test_the_number_of_labels_is_bounded() -> None:
    measure = Measure(most_names=3)
    for number in range(10):
        record = Record("", "chat", f"m{number}", f"m{number}", None, None, "", False, False, 1, 5, 0.0)
        record.status, record.prompt_tokens, record.finish_reasons = 200, 7, ["stop"]
        measure.add(record)
    text = measure.text([], []).decode()
    values = {
        sample.labels["adapter"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:prompt_tokens_total"
    }
    assert values == {"m0": 7, "m1": 7, "m2": 7, OTHER: 49}


def test_percentiles() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    found = distribution(values)
    assert found is not None
    for percent in (50, 90, 95, 99):
        assert found[f"p{percent}"] == pytest.approx(float(numpy.percentile(values, percent)))
    assert distribution([]) is None


def test_a_journal_is_set_aside_when_it_is_large(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "requests.jsonl", largest=100, kept=2)
    for number in range(40):
        journal.append({"number": number})
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    text = "".join((tmp_path / name).read_text() for name in reversed(names))
    numbers = [json.loads(line)["number"] for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 40))


def test_the_summary_goes_on_where_a_killed_server_stopped(server_of: Callable[..., str], tmp_path: Path) -> None:
    def ask() -> dict[str, Any]:
        with httpx.Client(base_url=server_of(folder=tmp_path), timeout=30) as http:
            http.post(CHAT, json=ASK)
            return http.get("/performance_summary").json()

    assert ask()["requests"] == 1
    with open(tmp_path / "requests.jsonl", "a") as file:
        file.write('{"id": "chatcm')
    assert ask()["requests"] == 2 and ask()["requests"] == 3


def test_texts_are_kept_where_asked_for_and_not_for_longer(server_of: Callable[..., str], tmp_path: Path) -> None:
    with httpx.Client(base_url=server_of(Serve(log_text=True), folder=tmp_path), timeout=30) as http:
        text = http.post(CHAT, json=ASK | {"temperature": 0}).json()["choices"][0]["message"]["content"]
    (line,) = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert line["answers"] == [text] and line["prompts"][0]["messages"] == [dict(ASK["messages"][0])]
    assert (tmp_path / "texts.jsonl").stat().st_mode & 0o077 == 0

    now = [0.0]
    texts = Texts(tmp_path / "other.jsonl", days=1, clock=lambda: now[0])
    for hour in range(60):
        now[0] = hour * 3600.0
        texts.append({"time": now[0]})
        times = [json.loads(line)["time"] for line in (tmp_path / "other.jsonl").read_text().splitlines()]
        assert now[0] - min(times) <= 86400 and len(times) >= min(hour + 1, 22)


def test_generate(http: httpx.Client) -> None:
    body = {"prompt": "Sure", "adapter": "anna", "max_length": 6}
    made = http.post("/generate", json=body).json()
    replies.Generated.model_validate(made)
    plain = {"model": "anna", "prompt": "Sure", "max_tokens": 6, "temperature": 0}
    completion = http.post("/v1/completions", json=plain).json()
    assert made["generated_texts"] == [completion["choices"][0]["text"]]
    assert made["input_tokens"] == completion["usage"]["prompt_tokens"]
    assert made["output_tokens"] == completion["usage"]["completion_tokens"] and made["generation_time"] > 0
    drawn = http.post("/generate", json=body | {"do_sample": True, "num_return_sequences": 3, "seed": 1}).json()
    assert len(set(drawn["generated_texts"])) > 1
    alike = http.post("/generate", json=body | {"num_return_sequences": 3})
    assert alike.status_code == 400 and "do_sample" in alike.json()["error"]["message"]
    asked = {"model": "anna", "messages": [{"role": "user", "content": "Sure"}], "max_tokens": 6, "temperature": 0}
    chat = http.post(CHAT, json=asked).json()["choices"][0]["message"]["content"]
    assert http.post("/generate", json=body | {"chat": True}).json()["generated_texts"] == [chat]


def test_a_batch_answers_in_order_and_fails_by_item(http: httpx.Client) -> None:
    items: list[Any] = [
        {"prompt": "Sure", "max_length": 3},
        {"prompt": "Sure", "adapter": "nobody"},
        {"prompt": 7},
        "text",
        {"prompt": "x", "max_length": 99999},
        {"prompt": "Sure", "adapter": "bert", "max_length": 3},
    ]
    response = http.post("/generate_batch", json=items)
    assert response.status_code == 200
    answers = response.json()
    codes = [answer["error"]["code"] if "error" in answer else None for answer in answers]
    assert codes == [None, "model_not_found", "R830", "R830", "context_length_exceeded", None]
    assert answers[2]["error"]["param"] == "prompt"
    for place in (0, 5):
        alone = http.post("/generate", json=items[place]).json()
        assert alone["generated_texts"] == answers[place]["generated_texts"]
    assert http.post("/generate_batch", json=[]).json() == []
    for bad in ({"prompt": "x"}, [{}] * 1025):
        assert http.post("/generate_batch", json=bad).status_code == 400


def test_model_info_counts_truly(http: httpx.Client, world: World) -> None:
    info = http.get("/model_info").json()
    replies.ModelInfo.model_validate(info)
    engine = world.replica.engine
    own = {id(p): p.numel() for name, p in engine.model.named_parameters() if "lora" not in name}
    assert info["parameters"] == info["total_parameters"] == sum(own.values())
    assert info["adapters"] == ["anna", "bert", "carl"] and info["adapter_parameters"] is None
    file = Path(world.adapters["bert"].path, "adapter_model.safetensors")
    adapter = sum(tensor.numel() for tensor in load_file(file).values())
    told = http.get("/model_info?model=bert").json()
    assert told["adapter_parameters"] == adapter and told["total_parameters"] == info["parameters"] + adapter
    assert told["content"] == world.adapters["bert"].hash and told["dtype"] == str(torch.float32).removeprefix("torch.")
    assert http.get("/model_info?model=nobody").status_code == 404


def test_a_tenant_sees_its_own_summary(server_of: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    anna, bert, boss = keys.add(file, "anna"), keys.add(file, "bert"), keys.add(file, "boss", admin=True)
    with httpx.Client(base_url=server_of(Serve(api_keys=str(file))), timeout=30) as http:

        def header(key: str) -> dict[str, str]:
            return {"authorization": f"Bearer {key}"}

        for key in (anna, anna, bert):
            http.post(CHAT, json=ASK, headers=header(key))
        seen = [http.get("/performance_summary", headers=header(key)).json()["requests"] for key in (anna, bert, boss)]
        assert seen == [2, 1, 3]


def test_observers_get_each_record(server_of: Callable[..., str]) -> None:
    records: list[Record] = []

    def broken(record: Record) -> None:
        raise ValueError

    url = server_of(observers=[broken, records.append])
    answer = httpx.post(f"{url}{CHAT}", json=ASK | {"model": "anna", "user": "u"}).json()
    (record,) = records
    assert (record.id, record.name, record.sticky, record.status) == (answer["id"], "anna", True, 200)
    assert record.completion_tokens == answer["usage"]["completion_tokens"]
