"""API keys: the file, what a key opens, and what it limits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from rayft.cli.app import app
from rayft.config.serve import Serve
from rayft.errors import UsageError
from rayft.serve import keys
from rayft.serve.errors import ApiError
from rayft.serve.keys import Key, Keys
from rayft.serve.limits import Limits

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Answer"}], "max_tokens": 4, "temperature": 0}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_command_prints_a_key_once_and_the_file_holds_its_hash(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    run = CliRunner().invoke
    done = run(
        app, ["keys", "add", "anna", "--file", file, "--adapter", "bert", "--tokens-per-minute", "900", "--json"]
    )
    key = json.loads(done.stdout)["key"]
    assert key not in Path(file).read_text() and Path(file).stat().st_mode & 0o077 == 0
    found = Keys(file).find(key)
    assert found is not None and (found.name, found.adapters, found.tokens_per_minute) == ("anna", ["bert"], 900)
    listed = run(app, ["keys", "list", "--file", file])
    assert "anna" in listed.stdout and found.hash not in listed.stdout and key not in listed.stdout
    twice = run(app, ["keys", "add", "anna", "--file", file])
    assert twice.exit_code == 2 and "R845" in twice.stderr
    assert run(app, ["keys", "revoke", "anna", "--file", file]).exit_code == 0
    assert Keys(file).find(key) is None
    assert run(app, ["keys", "revoke", "anna", "--file", file]).exit_code == 2


@pytest.mark.parametrize("text", ["", "[]", '{"keys": [{"name": "x"}]}', '{"keys": [{"name": "x", "hash": "plain"}]}'])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(UsageError, match="R844"):
        Keys(file)
    file.write_text(text)
    with pytest.raises(UsageError, match="R844"):
        Keys(file)


def test_writers_lose_nothing_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first = keys.add(file, "first")
    known = Keys(file)
    threads = [threading.Thread(target=keys.add, args=(file, f"k{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in keys.read(file)} == {"first", *(f"k{i}" for i in range(8))}
    file.write_text("{")
    assert known.find(first) is not None
    with pytest.raises(UsageError, match="R845"):
        keys.add(tmp_path / "other.json", "no good name")
    with pytest.raises(UsageError, match="R845"):
        keys.add(tmp_path / "other.json", "x", tokens_per_minute=0)


def test_what_keys_open(server_of: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    user, boss = keys.add(file, "user", adapters=["tiny", "an*"]), keys.add(file, "boss", admin=True)
    url = server_of(Serve(api_keys=str(file)))
    with httpx.Client(base_url=url, timeout=30) as http:
        for given in (
            {},
            bearer("wrong"),
            {"authorization": "Bearer"},
            {"authorization": f"Basic {user}"},
            {"authorization": "Bearer ÿ".encode("latin-1")},
        ):
            for method, path in (
                ("GET", "/v1/models"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/metrics"),
                ("GET", "/x"),
            ):
                response = http.request(method, path, headers=given, json=ASK if method == "POST" else None)  # type: ignore[arg-type]
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200
        assert [card["id"] for card in http.get("/v1/models", headers=bearer(user)).json()["data"]] == ["tiny", "anna"]
        assert len(http.get("/v1/models", headers=bearer(boss)).json()["data"]) == 4
        statuses = {
            model: http.post("/v1/chat/completions", json=ASK | {"model": model}, headers=bearer(user)).status_code
            for model in ("tiny", "anna", "bert", "nobody")
        }
        assert statuses == {"tiny": 200, "anna": 200, "bert": 403, "nobody": 404}
        unknown = http.post("/v1/chat/completions", json=ASK | {"model": "x"}, headers=bearer(user)).json()
        assert "bert" not in unknown["error"]["message"]
        urgent = ASK | {"priority": -1}
        assert http.post("/v1/chat/completions", json=urgent, headers=bearer(user)).status_code == 403
        assert http.post("/v1/chat/completions", json=urgent, headers=bearer(boss)).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        keys.revoke(file, "user")  # while the server runs
        assert http.get("/v1/models", headers=bearer(user)).status_code == 401
        late = keys.add(file, "late")
        assert http.get("/v1/models", headers=bearer(late)).status_code == 200


def test_a_content_hash_opens_no_back_door(server_of: Callable[..., str], tmp_path: Path, world: Any) -> None:
    file = tmp_path / "keys.json"
    user = keys.add(file, "user", adapters=["anna"])
    url = server_of(Serve(api_keys=str(file)))
    for name in ("anna", "bert"):
        body = ASK | {"model": world.adapters[name].hash}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(user)).status_code == 403


def test_limits_over_http_and_the_client_tries_again(server_of: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    slow = keys.add(file, "slow", requests_per_second=1)
    small = keys.add(file, "small", tokens_per_minute=100)
    url = server_of(Serve(api_keys=str(file)))
    chat = f"{url}/v1/chat/completions"
    assert httpx.post(chat, json=ASK, headers=bearer(slow)).status_code == 200
    refused = httpx.post(chat, json=ASK, headers=bearer(slow))
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert (
        refused.json()["error"]["type"] == "rate_limit_error"
        and refused.json()["error"]["code"] == "rate_limit_exceeded"
    )
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=slow, max_retries=2)
    assert client.chat.completions.create(**ASK).usage is not None  # type: ignore[call-overload]
    used = httpx.post(chat, json=ASK | {"max_tokens": 60}, headers=bearer(small)).json()["usage"]["total_tokens"]
    assert httpx.post(chat, json=ASK | {"max_tokens": 100 - used}, headers=bearer(small)).status_code == 200
    refused = httpx.post(chat, json=ASK | {"max_tokens": 60}, headers=bearer(small))
    assert refused.status_code == 429 and "tokens per minute" in refused.json()["error"]["message"]


def test_pages_of_other_sites_may_not_use_an_open_server(server_of: Callable[..., str], tmp_path: Path) -> None:
    url = server_of()
    own = url.removeprefix("http://")
    answers: list[tuple[dict[str, str], int]] = [
        ({}, 200),
        ({"origin": url}, 200),  # the page that the server itself shows
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": f"evil.example:{own.partition(':')[2]}"}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "["}, 403),
    ]
    for headers, status in answers:
        response = httpx.get(f"{url}/v1/models", headers=headers)
        assert response.status_code == status, (headers, response.text)
    assert (
        httpx.get(f"{server_of(Serve(host='0.0.0.0'))}/v1/models", headers={"host": "rayft.example"}).status_code == 200
    )
    file = tmp_path / "keys.json"
    key = keys.add(file, "x")
    guarded = server_of(Serve(api_keys=str(file)))
    headers = {"host": "rayft.example", "origin": "https://other.example", **bearer(key)}
    assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200


def test_buckets() -> None:
    now = [0.0]
    limits = Limits(clock=lambda: now[0])

    def key(**fields: Any) -> Key:
        return Key(name="k", hash="0" * 64, **fields)

    def refused(key: Key, tokens: int) -> float:
        with pytest.raises(ApiError) as caught:
            limits.enter(key, tokens)
        assert caught.value.retry_after is not None
        return caught.value.retry_after

    fast = key(requests_per_second=2)
    limits.enter(fast, 1), limits.enter(fast, 1)
    assert refused(fast, 1) == 0.5
    now[0] += 0.5
    limits.enter(fast, 1)

    tokens = key(tokens_per_minute=60)
    first = limits.enter(tokens, 40)
    assert refused(tokens, 30) == 10  # 20 are left, one comes per second
    first.settle(10)  # 30 come back
    second = limits.enter(tokens, 50)
    second.settle(100)  # a long prompt: 50 in debt
    assert refused(tokens, 10) == 60
    now[0] += 1000
    limits.enter(tokens, 10_000).settle(0)  # more than a minute's worth, when a whole minute's is there
    assert limits.enter(tokens, 60) is not None

    narrow = key(concurrency=1)
    ticket = limits.enter(narrow, 5)
    refused(narrow, 5)
    ticket.settle(5)
    limits.enter(narrow, 5)
