"""The whole HTTP side: aliases, versions and canaries behind OpenAI's routes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Model

from rayft.runs.registry import Registry
from rayft.serve import keys
from rayft.serve.assemble import assemble
from tests.serve.api.conftest import World, planned

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Please order"}], "max_tokens": 8, "temperature": 0}


@dataclass
class Site:
    registry: Registry
    http: httpx.Client
    user: dict[str, str]
    boss: dict[str, str]

    def ask(self, model: str, **fields: Any) -> httpx.Response:
        return self.http.post(CHAT, json=ASK | {"model": model} | fields, headers=self.user)

    def text(self, model: str, **fields: Any) -> str:
        response = self.ask(model, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]


@pytest.fixture
def site(world: World, tmp_path: Path) -> Iterator[Site]:
    """`live` has anna as version 1 in production and bert as version 2 in staging."""
    registry = Registry(tmp_path / "registry")
    registry.register("live", world.adapters["anna"].path, stage="production")
    registry.register("live", world.adapters["bert"].path, stage="staging")
    file = tmp_path / "keys.json"
    user, boss = (
        {"authorization": f"Bearer {keys.add(file, name, admin=name == 'boss')}"} for name in ("user", "boss")
    )
    plan = planned(tmp_path, api_keys=str(file), roots=[str(Path(world.adapters["anna"].path).parent)])
    with world.listening(assemble(plan, world.replica)) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield Site(registry, http, user, boss)


@pytest.fixture
def alone(http: httpx.Client) -> dict[str, str]:
    """What each adapter answers, served as such."""
    return {
        name: http.post(CHAT, json=ASK | {"model": name}).json()["choices"][0]["message"]["content"]
        for name in ("tiny", "anna", "bert", "carl")
    }


def test_names_versions_stages_and_hashes(site: Site, alone: dict[str, str], world: World) -> None:
    bert = world.adapters["bert"].hash
    names = {
        "tiny": "tiny", "live": "anna", "live@1": "anna", "live@2": "bert", "live@staging": "bert",
        "live@production": "anna", bert: "bert",
    }  # fmt: skip
    for name, adapter in names.items():
        response = site.ask(name)
        assert response.json()["choices"][0]["message"]["content"] == alone[adapter], name
        assert response.json()["model"] == name
        expected = None if adapter == "tiny" else {"anna": "1", "bert": "2"}[adapter]
        assert response.headers.get("x-rayft-version") == expected
    for name in ("live@3", "live@", "live@none", "live@archived", "dead", bert[:40], "f" * 64, "@", ""):
        assert site.ask(name).status_code == (404 if name else 400), name
    cards = site.http.get("/v1/models", headers=site.user).json()["data"]
    assert [Model.model_validate(card).id for card in cards] == ["tiny", "live"]
    assert cards[1]["parent"] == "tiny" and cards[1]["root"] == world.adapters["anna"].path
    site.registry.strengthen("live", 0.0)
    assert site.text("live") == alone["tiny"] and site.text("live", lora_strength=1) == alone["anna"]


def test_a_damaged_registry_is_not_the_fault_of_who_asks(site: Site) -> None:
    file = site.registry.folder / "registry.json"
    whole = file.read_text()
    file.write_text(whole[:50])
    assert site.ask("live").status_code == 500 and site.ask("live").json()["error"]["code"] == "R420"
    assert site.ask("tiny").status_code == 200
    file.write_text(whole)
    assert site.ask("live").status_code == 200


def test_a_canary_keeps_its_users_and_a_rollback_is_at_once(site: Site, alone: dict[str, str]) -> None:
    site.registry.weigh("live", {1: 50, 2: 50})
    seen: dict[str, str] = {}
    for _ in range(2):
        for user in map(str, range(12)):
            version = site.ask("live", user=user, max_tokens=1).headers["x-rayft-version"]
            assert seen.setdefault(user, version) == version
    assert set(seen.values()) == {"1", "2"}
    sticky = {"x-session-id": "0", **site.user}
    by_header = {
        site.http.post(CHAT, json=ASK | {"model": "live", "user": u, "max_tokens": 1}, headers=sticky).headers[
            "x-rayft-version"
        ]
        for u in seen
    }
    assert by_header == {seen["0"]}
    free = Counter(site.ask("live", max_tokens=1).headers["x-rayft-version"] for _ in range(40))
    assert set(free) == {"1", "2"}  # one of 2^39 such tests sees one version only

    report = site.http.get("/v1/adapters/live/experiment", headers=site.boss).json()
    counts = {variant["version"]: variant["count"] for variant in report["variants"]}
    assert sum(counts.values()) == 24 + 12 + 40
    id = site.ask("live", user="0").json()["id"]
    feedback = {"id": id, "score": 1}
    assert site.http.post("/v1/feedback", json=feedback, headers=site.user).status_code == 403
    told = site.http.post("/v1/feedback", json=feedback, headers=site.boss).json()
    assert str(told["version"]) == seen["0"]
    assert site.http.post("/v1/adapters/live/rollback", headers=site.boss).status_code == 200
    assert {site.text("live", user=user) for user in seen} == {alone["anna"]}


def test_adapters_come_and_go_while_the_server_runs(site: Site, alone: dict[str, str], world: World) -> None:
    carl = world.adapters["carl"].path
    body = {"name": "new", "source": carl}
    assert site.http.post("/v1/adapters", json=body, headers=site.user).status_code == 403
    assert site.http.post("/v1/adapters", json=body).status_code == 401
    outside = site.http.post("/v1/adapters", json={"name": "new", "source": "/etc"}, headers=site.boss)
    assert outside.status_code == 403 and outside.json()["error"]["code"] == "R434"
    assert site.ask("new").status_code == 404
    added = site.http.post("/v1/adapters", json=body, headers=site.boss)
    assert added.status_code == 200, added.text
    assert site.text("new") == alone["carl"]
    lora = {"lora_name": "other", "lora_path": world.adapters["bert"].path}
    loaded = site.http.post("/v1/load_lora_adapter", json=lora, headers=site.boss)
    assert loaded.status_code == 200 and loaded.headers["content-type"].startswith("text/plain")
    assert site.text("other") == alone["bert"]
    assert site.http.post("/v1/load_lora_adapter", json=lora, headers=site.boss).status_code == 409
    assert site.http.post("/v1/load_lora_adapter", json={"lora_name": 3}, headers=site.boss).status_code == 400
    gone = site.http.request("DELETE", "/v1/adapters/new", headers=site.boss)
    assert gone.status_code == 200 and site.ask("new").status_code == 404
    missing = site.http.request("DELETE", "/v1/adapters/new", headers=site.boss)
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "R421"


def test_no_answer_mixes_versions_while_they_change(site: Site, alone: dict[str, str]) -> None:
    done = threading.Event()
    wrong: list[str] = []
    answers: Counter[str] = Counter()

    def load() -> None:
        with httpx.Client(base_url=site.http.base_url, timeout=60) as http:
            while not done.is_set():
                response = http.post(CHAT, json=ASK | {"model": "live"}, headers=site.user)
                version = response.headers.get("x-rayft-version", "")
                text = (
                    response.json()["choices"][0]["message"]["content"]
                    if response.status_code == 200
                    else response.text
                )
                answers[version] += 1
                if text != alone.get({"1": "anna", "2": "bert"}.get(version, ""), ""):
                    wrong.append(text)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        for version in (2, 1):
            body = {"version": version}
            assert site.http.post("/v1/adapters/live/promote", json=body, headers=site.boss).status_code == 200
            before, until = answers[str(version)], time.monotonic() + 30
            while answers[str(version)] == before and time.monotonic() < until:
                time.sleep(0.005)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong and set(answers) == {"1", "2"}
