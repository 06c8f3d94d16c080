"""The routes about adapters, over a registry in a folder and a backend that notes what it is told."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Header, Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from rayft.errors import RayftError, UsageError
from rayft.runs.registry import Registry
from rayft.serve.backend import ModelCard, ReplicaState
from rayft.serve.experiment import Experiments
from rayft.serve.job import Content, Job, Piece
from rayft.serve.lifecycle import Lifecycle
from rayft.serve.roots import Roots
from rayft.serve.routes.adapters import STATUS, router
from tests.runs.adapters import adapter_folder


class Noting:
    """A backend without an engine: it has the contents that it was told to load."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.pinned: dict[str, bool] = {}
        """By hash, of everything that is loaded."""
        self.broken: set[str] = set()
        self.slots = 99
        self.served_before_load: list[str] = []

    async def card(self) -> ModelCard:
        return ModelCard("base-model", "b", "Llama", "fp32", None, 1, 1, 1, 1)

    def generate(self, job: Job) -> AsyncIterator[Sequence[Piece]]:
        raise NotImplementedError

    async def load(self, content: Content, pinned: bool | None = None) -> None:
        assert Path(content.path, "adapter_model.safetensors").exists()
        if content.hash in self.broken:
            raise UsageError("R803", "this adapter does not fit the base model")
        if pinned and sum(self.pinned.values()) >= self.slots and not self.pinned.get(content.hash):
            raise UsageError("R816", "every slot is taken by a pinned adapter")
        if content.hash not in self.pinned:
            serving = [v.hash for a in self.registry.aliases().values() for v in a.versions if v.number in a.weights]
            if content.hash in serving:
                self.served_before_load.append(content.hash)
        self.pinned[content.hash] = self.pinned.get(content.hash, False) if pinned is None else pinned

    async def unload(self, hash: str) -> None:
        self.pinned.pop(hash, None)

    async def states(self) -> list[ReplicaState]:
        cached = tuple(self.pinned)
        loaded = tuple(hash for hash, pinned in self.pinned.items() if pinned)
        return [ReplicaState(str(n), 0, 0, 0, 0.0, loaded, cached, 8, 0, 0, 0, 0, 0, 0) for n in range(2)]


class Server:
    """A client of the routes, and what stands behind them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "allowed").mkdir()
        self.registry = Registry(folder / "registry")
        self.backend = Noting(self.registry)
        self.experiments = Experiments()
        roots = Roots([str(folder / "allowed"), "hf://friends"], str(folder / "runs"))
        self.lifecycle = Lifecycle(self.registry, self.backend, roots, self.experiments)
        app = FastAPI()
        app.include_router(router(self.lifecycle, self._admin))

        @app.exception_handler(RayftError)
        async def shaped(request: Request, error: RayftError) -> JSONResponse:
            return JSONResponse({"id": error.id, "message": str(error)}, STATUS.get(error.id, 400))

        self.client = TestClient(app)

    async def _admin(self, x_key: str = Header("")) -> str:
        if x_key != "secret":
            raise UsageError("R434", "no admin")
        return "anna"

    def adapter(self, name: str, value: float, **config: Any) -> str:
        return str(adapter_folder(self.folder / "allowed" / name, value, **config))

    def ask(self, method: str, path: str, body: object = None, status: int = 200, **options: Any) -> Any:
        response = self.client.request(method, path, json=body, headers={"x-key": "secret"}, **options)
        assert response.status_code == status, response.text
        return response.json() if response.headers["content-type"] == "application/json" else response.text

    def add(self, name: str, value: float, status: int = 200, **more: Any) -> Any:
        source = self.adapter(f"{name.replace('/', '-')}-{value}", value)
        return self.ask("POST", "/v1/adapters", {"name": name, "source": source, **more}, status)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_the_life_of_an_adapter(server: Server) -> None:
    made = server.add("team/bot", 1.0, note="first")
    assert (made["name"], made["production"], made["weights"]) == ("team/bot", 1, {"1": 1.0})
    (one,) = made["versions"]
    assert one["note"] == "first" and one["weight"] == 1.0 and one["stage"] == "production" and "path" not in one
    assert (one["cached"], one["loaded"]) == (2, 0) and one["source"].endswith("team-bot-1.0")
    made = server.add("team/bot", 2.0)
    assert made["weights"] == {"1": 1.0}, "a second version waits"
    made = server.add("team/bot", 3.0, weight=0.1)
    assert made["weights"] == pytest.approx({"1": 0.9, "3": 0.1})
    split = server.ask("POST", "/v1/adapters/team/bot/weights", {"weights": {"1": 85, "2": 10, "3": 5}})
    assert split["weights"] == {"1": 0.85, "2": 0.1, "3": 0.05}
    assert server.ask("POST", "/v1/adapters/team/bot/promote", {"version": 2})["production"] == 2
    back = server.ask("POST", "/v1/adapters/team/bot/rollback")
    assert back["weights"] == split["weights"] and back["production"] == 1
    assert [version["stage"] for version in back["versions"]] == ["production", "staging", "staging"]
    again = server.ask("POST", "/v1/adapters", {"name": "team/bot", "version": 2, "weight": 0.5})
    assert again["weights"] == pytest.approx({"1": 0.5 * 0.85 / 0.9, "2": 0.5, "3": 0.5 * 0.05 / 0.9})
    shown = server.ask("GET", "/v1/adapters/team/bot")
    assert [event["what"] for event in shown["history"]][-3:] == ["promote", "rollback", "weigh"]
    assert {event["who"] for event in shown["history"]} == {"anna"}
    assert shown["history"][-2]["after"]["weights"] == split["weights"]
    listed = server.ask("GET", "/v1/adapters")
    assert [entry["name"] for entry in listed["data"]] == ["team/bot"] and "history" not in listed["data"][0]
    server.ask("POST", "/v1/adapters/team/bot/promote", {"version": 1})
    removed = server.ask("DELETE", "/v1/adapters/team/bot?version=2")
    assert removed == {"object": "adapter", "name": "team/bot", "version": 2, "deleted": True}
    assert len(server.backend.pinned) == 2
    server.ask("DELETE", "/v1/adapters/team/bot")
    assert server.ask("GET", "/v1/adapters")["data"] == [] and server.backend.pinned == {}
    assert server.backend.served_before_load == []


def test_a_broken_adapter_never_answers(server: Server) -> None:
    server.add("bot", 1.0)
    source = server.adapter("broken", 2.0)
    hash = Registry(server.folder / "probe").register("probe", source).hash
    server.backend.broken.add(hash)
    for more in ({"promote": True}, {"weight": 0.5}, {}):
        assert server.ask("POST", "/v1/adapters", {"name": "bot", "source": source, **more}, 400)["id"] == "R803"
        assert server.ask("POST", "/v1/adapters", {"name": "new", "source": source, **more}, 400)["id"] == "R803"
    listed = server.ask("GET", "/v1/adapters")["data"]
    assert [(entry["name"], entry["weights"], len(entry["versions"])) for entry in listed] == [("bot", {"1": 1.0}, 1)]
    assert len(list((server.registry.folder / "adapters").iterdir())) == 1
    server.backend.broken.clear()
    server.ask("POST", "/v1/adapters", {"name": "bot", "source": source})
    server.backend.pinned.clear()
    server.backend.broken.add(hash)
    number = server.registry.alias("bot").versions[-1].number
    server.ask("POST", "/v1/adapters/bot/promote", {"version": number}, 400)
    server.ask("POST", "/v1/adapters/bot/weights", {"weights": {"1": 1, str(number): 1}}, 400)
    assert server.registry.alias("bot").weights == {1: 1.0}


def test_pins_follow_the_versions_that_answer(server: Server) -> None:
    server.add("bot", 1.0, pin=True)
    server.add("bot", 2.0)
    hashes = [version.hash for version in server.registry.alias("bot").versions]
    assert server.backend.pinned == {hashes[0]: True, hashes[1]: False}
    server.ask("POST", "/v1/adapters/bot/weights", {"weights": {"1": 1, "2": 1}})
    assert server.backend.pinned == {hashes[0]: True, hashes[1]: True}
    server.ask("POST", "/v1/adapters/bot/promote", {"version": 2})
    assert server.backend.pinned == {hashes[0]: False, hashes[1]: True}
    server.ask("POST", "/v1/adapters/bot/rollback")
    assert server.backend.pinned == {hashes[0]: True, hashes[1]: True}
    server.add("other", 1.0, pin=True)
    assert server.ask("POST", "/v1/adapters/bot/pin", {"pinned": False})["pinned"] is False
    assert server.backend.pinned == {hashes[0]: True, hashes[1]: False}, "the other name still pins the first"
    server.ask("DELETE", "/v1/adapters/other")
    assert server.backend.pinned == {hashes[0]: False, hashes[1]: False}
    server.backend.slots = 1
    assert server.ask("POST", "/v1/adapters/bot/pin", {"pinned": True}, 400)["id"] == "R816"
    assert not server.registry.alias("bot").pinned
    server.backend.slots = 0
    assert server.add("third", 3.0, status=400, pin=True)["id"] == "R816"
    assert "third" not in server.registry.aliases()


def test_pins_follow_what_others_do_to_the_registry(server: Server) -> None:
    """`rayft registry` in another process, a replica that starts, and a pin that finds no slot."""
    server.add("bot", 1.0, pin=True)
    server.add("bot", 2.0)
    one, two = (version.hash for version in server.registry.alias("bot").versions)
    other = Registry(server.registry.folder)
    other.promote("bot", 2)

    async def follow() -> None:
        watching = asyncio.get_running_loop().create_task(server.lifecycle.watch(0.01))
        try:
            for change, expected in (
                (lambda: None, {one: False, two: True}),
                (lambda: other.rollback("bot"), {one: True, two: False}),
                (server.backend.pinned.clear, {}),  # the replicas start again, which nobody tells
                (lambda: other.pin("bot", False), {one: False}),
                (lambda: other.pin("bot", True), {one: True}),
                (lambda: other.remove("bot"), {}),
            ):
                change()
                await asyncio.sleep(0.1)
                assert server.backend.pinned == expected
        finally:
            watching.cancel()

    asyncio.run(follow())
    server.add("bot", 1.0, pin=True)
    server.backend.pinned.clear()
    server.backend.slots = 0
    asyncio.run(server.lifecycle.sync(everything=True))
    assert server.backend.pinned == {}
    server.backend.slots = 1
    asyncio.run(server.lifecycle.sync(everything=True))
    assert server.backend.pinned == {one: True}


def test_contents_that_another_name_has_stay_loaded(server: Server) -> None:
    server.add("bot", 1.0)
    server.add("twin", 1.0)
    server.ask("DELETE", "/v1/adapters/bot")
    assert len(server.backend.pinned) == 1 and server.ask("GET", "/v1/adapters/twin")["versions"][0]["cached"] == 2


def test_a_changed_folder_is_a_new_version_and_the_old_one_is_kept(server: Server) -> None:
    source = server.adapter("bot", 1.0)
    server.ask("POST", "/v1/adapters", {"name": "bot", "source": source})
    assert server.ask("POST", "/v1/adapters", {"name": "bot", "source": source}, 409)["id"] == "R424"
    server.adapter("bot", 2.0)
    server.ask("POST", "/v1/adapters", {"name": "bot", "source": source, "promote": True})
    shutil.rmtree(source)
    assert server.ask("POST", "/v1/adapters/bot/rollback")["weights"] == {"1": 1.0}


def test_vllms_routes(server: Server) -> None:
    source = server.adapter("sql", 1.0)
    asked = {"lora_name": "sql", "lora_path": source, "is_3d_lora_weight": False}
    text = server.ask("POST", "/v1/load_lora_adapter", asked)
    assert isinstance(text, str) and text.startswith("Success: ") and "'sql'" in text
    assert server.ask("POST", "/v1/load_lora_adapter", asked, 409)["id"] == "R424"
    server.ask("POST", "/v1/load_lora_adapter", asked | {"load_inplace": True})
    server.adapter("sql", 2.0)
    server.ask("POST", "/v1/load_lora_adapter", asked | {"load_inplace": True})
    assert server.registry.alias("sql").weights == {2: 1.0}
    assert server.ask("POST", "/v1/load_lora_adapter", asked | {"lora_name": "base-model"}, 400)["id"] == "R436"
    missing = {"lora_name": "x", "lora_path": str(server.folder / "allowed" / "nowhere")}
    assert server.ask("POST", "/v1/load_lora_adapter", missing, 404)["id"] == "R414"
    text = server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "sql", "lora_int_id": None})
    assert text.startswith("Success: ") and server.registry.aliases() == {} and server.backend.pinned == {}
    server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"}, 404)


def test_feedback_and_experiment(server: Server) -> None:
    server.add("a/bot", 1.0)
    server.experiments.observe("a/bot", 1, "chatcmpl-1", seconds=0.5, tokens=8, ok=True)
    noted = server.ask("POST", "/v1/feedback", {"id": "chatcmpl-1", "score": 1})
    assert noted == {"object": "feedback", "id": "chatcmpl-1", "name": "a/bot", "version": 1}
    assert server.ask("POST", "/v1/feedback", {"id": "chatcmpl-2", "score": 1}, 404)["id"] == "R433"
    report = server.ask("GET", "/v1/adapters/a/bot/experiment")
    (variant,) = report["variants"]
    assert (variant["count"], variant["p50"], variant["mean_feedback"]) == (1, 0.5, 1.0) and report["comparisons"] == []
    server.ask("GET", "/v1/adapters/nobody/experiment", status=404)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/adapters/nobody", None, 404),
        ("DELETE", "/v1/adapters/nobody", None, 404),
        ("DELETE", "/v1/adapters/bot?version=9", None, 404),
        ("DELETE", "/v1/adapters/bot?version=1", None, 409),
        ("DELETE", "/v1/adapters/bot?version=x", None, 422),
        ("POST", "/v1/adapters/bot/rollback", None, 409),
        ("POST", "/v1/adapters/nobody/rollback", None, 404),
        ("POST", "/v1/adapters/bot/promote", {"version": 9}, 404),
        ("POST", "/v1/adapters/bot/promote", {"version": 10**400}, 404),
        ("POST", "/v1/adapters/bot/promote", {}, 422),
        ("POST", "/v1/adapters/bot/promote", {"version": 1, "more": 1}, 422),
        ("POST", "/v1/adapters/bot/weights", {"weights": {}}, 422),
        ("POST", "/v1/adapters/bot/weights", {"weights": {"1": 0}}, 400),
        ("POST", "/v1/adapters/bot/weights", {"weights": {"1": -1}}, 400),
        ("POST", "/v1/adapters/bot/weights", {"weights": {"one": 1}}, 422),
        ("POST", "/v1/adapters/bot/weights", {"weights": {"9": 1}}, 404),
        ("POST", "/v1/adapters/bot/pin", {"pinned": "maybe"}, 422),
        ("POST", "/v1/adapters", {"name": "bot"}, 422),
        ("POST", "/v1/adapters", {"name": "bot", "version": 1, "source": "run:a"}, 422),
        ("POST", "/v1/adapters", {"name": "bot", "version": 1, "weight": 1.5}, 422),
        ("POST", "/v1/adapters", {"name": "bot", "version": 1, "weight": 0.5, "promote": True}, 422),
        ("POST", "/v1/adapters", {"name": "bot", "source": "run:nobody"}, 404),
        ("POST", "/v1/adapters", {"name": "bot", "source": "run:no body"}, 400),
        ("POST", "/v1/adapters", {"name": "base-model", "source": "run:a"}, 400),
        ("POST", "/v1/adapters", {"name": "bot", "source": "/etc"}, 403),
        ("POST", "/v1/adapters", {"name": "../bot", "source": "ALLOWED"}, 400),
        ("POST", "/v1/feedback", {"id": "x", "score": "good"}, 422),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x"}, 422),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "\u0000"}, 403),
    ],
)
def test_bad_requests(server: Server, method: str, path: str, body: Any, status: int) -> None:
    server.add("bot", 1.0)
    if body and body.get("source") == "ALLOWED":
        body = body | {"source": server.adapter("bot", 1.0)}
    before = server.registry.aliases()
    server.ask(method, path, body, status)
    assert server.registry.aliases() == before


def test_every_route_asks_for_the_key(server: Server) -> None:
    schema = server.client.get("/openapi.json").json()
    routes = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    assert len(routes) == 12
    bodies = {"/v1/adapters": {"name": "a", "source": "run:a"}, "/v1/feedback": {"id": "a", "score": 1}}
    for method, path in routes:
        body = bodies.get(path, {"version": 1, "weights": {"1": 1}, "lora_name": "a", "lora_path": "b"})
        body = {"version": 1} if path.endswith("promote") else body
        body = {"weights": {"1": 1}} if path.endswith("weights") else {} if path.endswith("pin") else body
        response = server.client.request(method, path.replace("{name}", "a"), json=body)
        assert (response.status_code, response.json()["id"]) == (403, "R434"), (method, path, response.text)
    assert not server.registry.folder.exists()


def test_the_http_side_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, rayft.serve.routes.adapters, rayft.serve.rollout, rayft.serve.experiment\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'peft', 'scipy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
