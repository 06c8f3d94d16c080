"""Connecting: quickly, to the right cluster, or with a clear refusal."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.config.recipe import Recipe
from rayft.errors import UsageError
from rayft.runtime import auth, preflight, session
from rayft.runtime.cluster import Node, snapshot


def recipe(**values: object) -> Recipe:
    return Recipe.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl"}, **values})


@pytest.fixture
def disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not called ray.init."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def web_server() -> Iterator[str]:
    """Something that listens and is no Ray head."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.usefixtures("disconnected")
def test_nobody_there_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"R501.*127.0.0.1:9"):
        session.connect(recipe())
    assert time.monotonic() - start < 10


@pytest.mark.usefixtures("disconnected")
def test_something_else_answers(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", web_server)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UsageError, match=r"R501.*no Ray head"):
        session.connect(recipe())


@pytest.mark.usefixtures("disconnected")
def test_a_dashboard_address_is_for_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(UsageError, match="R509") as caught:
        session.connect(recipe())
    assert "rayft submit" in (caught.value.hint or "")


def test_named_variables_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESENT", "value")
    monkeypatch.delenv("ABSENT", raising=False)
    assert session.environment(recipe(scale={"env": ["PRESENT"]})) == {"PRESENT": "value"}
    with pytest.raises(UsageError, match=r"R510.*ABSENT"):
        session.connect(recipe(scale={"env": ["PRESENT", "ABSENT"]}))


@pytest.mark.usefixtures("disconnected")
def test_every_task_and_actor_gets_the_variables_but_a_job_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda address, **options: told.append(options))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("PRESENT", "value")
    monkeypatch.setenv("RAYFT_HOME", "/a/home")
    session.connect(recipe(scale={"env": ["PRESENT"]}))
    assert told[0]["runtime_env"]["env_vars"].items() >= {"PRESENT": "value", "RAYFT_HOME": "/a/home"}.items()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    session.connect(recipe(scale={"env": ["PRESENT"]}))
    assert told[1]["runtime_env"] is None


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert auth.token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert auth.token() == "home"
    (tmp_path / "other").write_text("path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert auth.token() == "path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert auth.token() == "variable"


def test_the_session_that_exists_is_used(ray_cluster: str) -> None:
    assert session.connect(recipe()) == ray_cluster
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_cluster_tells_good_from_bad_tokens(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth.settle(ray_cluster)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef")
    with pytest.raises(UsageError, match=r"R502.*does not accept our token"):
        auth.settle(ray_cluster)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(UsageError, match=r"R502.*there is none here"):
        auth.settle(ray_cluster)


def test_preflight_of_the_real_cluster(ray_cluster: str, tmp_path: Path) -> None:
    start = time.monotonic()
    placement = preflight.check(recipe(storage=str(tmp_path), scale={"workers": "auto"}))
    assert placement == preflight.Placement((4, 4), False, 1, {"CPU": 1})
    with pytest.raises(UsageError, match=r"R503.*9 workers.*room for 4.*Missing: 5 CPU"):
        preflight.check(recipe(storage=str(tmp_path), scale={"workers": 9}))
    assert time.monotonic() - start < 5


def test_a_busy_cluster_is_said_aloud(ray_cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import ray

    @ray.remote(num_cpus=3)
    class Busy:
        def ready(self) -> bool:
            return True

    busy = Busy.remote()
    ray.get(busy.ready.remote())
    try:
        preflight._wait_until_free(preflight.place(recipe(scale={"workers": 2}), snapshot()), recipe(), patience=0.3)
    finally:
        ray.kill(busy)
    assert "the cluster is busy: free room for 1 of 2 workers" in caplog.text


def test_a_node_that_does_not_see_the_storage_is_found(ray_cluster: str, tmp_path: Path) -> None:
    (node,) = snapshot().nodes
    assert preflight.nodes_that_miss(str(tmp_path / "runs"), [node]) == []
    with pytest.MonkeyPatch.context() as blind:
        blind.setattr(preflight, "exists_there", lambda path: False)
        assert preflight.nodes_that_miss(str(tmp_path / "runs"), [node]) == [node]


def test_nodes_count_what_fits() -> None:
    node = Node("id", "host", {"CPU": 4.0, "big": 0.3}, {"CPU": 1.0})
    assert (node.room({"CPU": 1, "big": 0.1}), node.free_room({"CPU": 1})) == (3, 1)
    assert node.room({"CPU": 1, "GPU": 1}) == 0
