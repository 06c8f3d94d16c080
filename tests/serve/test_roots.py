"""Where adapters may come from: every way out of the allowed places is closed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.errors import UsageError
from rayft.runs.storage import locate
from rayft.serve.roots import Roots
from tests.runs.adapters import adapter_folder


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """``allowed/`` and ``runs/``, where adapters may come from, and ``secret/``."""
    for name in ("allowed/good", "allowed/deep/good", "secret/bad", "allowed-not", "runs/demo/adapter"):
        adapter_folder(tmp_path / name, 1.0)
    return tmp_path


@pytest.fixture
def roots(places: Path) -> Roots:
    return Roots([str(places / "allowed"), "hf://friends", "hf://other/one"], str(places / "runs"))


def test_what_is_admitted(roots: Roots, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("allowed/good", "allowed/deep/good", "allowed/../allowed/good", "runs/demo/adapter"):
        assert roots.admit(str(places / name)) == str(places / name).replace("/allowed/..", "")
    assert roots.admit(f"file://{places}/allowed/good") == str(places / "allowed/good")
    assert roots.admit(str(places / "runs/demo")) == str(places / "runs/demo/adapter")
    monkeypatch.chdir(places)
    assert roots.admit("allowed/good") == str(places / "allowed/good")
    assert roots.admit("run:demo@best") == "run:demo@best"
    (places / "link").symlink_to(places / "allowed")
    assert roots.admit(str(places / "link/good")) == str(places / "link/good")


@pytest.mark.parametrize(
    "source",
    [
        "{}/secret/bad",
        "{}/allowed/../secret/bad",
        "{}/allowed/good/../../secret/bad",
        "{}/allowed-not",
        "{}",
        "/",
        "/etc/passwd",
        "{}/nowhere",
        "../../../etc",
        "~",
        "~root",
        "{}/allowed/good\0",
        "file:///etc",
        "file://{}/secret/bad",
        "{}/allowed/out",
        "{}/allowed/out/bad",
        "{}/allowed/parts",
        "{}/runs/demo2",
        "s3://bucket/x",
        "http://169.254.169.254/latest",
        "https://example.org/a",
        "hf://strangers/adapter",
        "hf://friends",
        "hf://friends/../strangers/x",
        "hf://friendsofmine/x",
        "hf://other/two",
        "hf://friends/a/b",
        "hf://friends/x@../y",
        "",
    ],
)
def test_what_is_refused(roots: Roots, places: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places / "secret")
    (places / "allowed/out").symlink_to(places / "secret")
    parts = adapter_folder(places / "allowed/parts", 1.0)
    (parts / "tokenizer.json").unlink()
    (parts / "tokenizer.json").symlink_to(places / "secret/bad/tokenizer.json")
    (places / "runs/demo2").mkdir()
    (places / "runs/demo2/adapter").symlink_to(places / "secret/bad")
    with pytest.raises(UsageError, match="R434"):
        roots.admit(source.replace("{}", str(places)))


def test_buckets_only_below_listed_prefixes(tmp_path: Path) -> None:
    roots = Roots(["s3://bucket/models/", "gs://other?endpoint_override=here"], str(tmp_path))
    assert roots.admit("s3://bucket/models/a/b/") == "s3://bucket/models/a/b"
    assert roots.admit("s3://bucket/models") == "s3://bucket/models"
    assert roots.admit("gs://other/a") == "gs://other/a?endpoint_override=here", "the root says which server"
    for source in (
        "s3://bucket/models2/a",
        "s3://bucket",
        "s3://bucket/models/../secret",
        "s3://bucket/models/%2e%2e/secret",
        "s3://bucket/models/a?endpoint_override=evil",
        "s3://key:secret@bucket/models/a",
        "s3a://bucket/models/a",
        "gs://other/a?endpoint_override=evil",
    ):
        with pytest.raises(UsageError, match="R434"):
            roots.admit(source)


def test_a_bucket_below_its_prefix_can_be_registered(tmp_path: Path) -> None:
    from rayft.runs.registry import Registry

    locate(adapter_folder(tmp_path / "a", 1.0)).copy_to(locate("memory://roots-test/adapters/a"))
    source = Roots(["memory://roots-test/adapters"], str(tmp_path)).admit("memory://roots-test/adapters/a")
    version = Registry(tmp_path / "registry").register("bot", source)
    assert version.hash == Registry(tmp_path / "two").register("bot", tmp_path / "a").hash


def test_hub_adapters_of_listed_owners(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Callable[[str, Path], Path]
) -> None:
    """The Hub's own client finds them in its cache, where no network is."""
    folder = hub_cache("friends/sql", adapter_folder(tmp_path / "source", 1.0))
    assert roots.admit("hf://friends/sql") == str(folder)
    with pytest.raises(UsageError, match=r"R435: hf://other/one cannot be fetched"):
        roots.admit("hf://other/one")
    from rayft.runs.registry import Registry

    assert Registry(tmp_path / "registry").register("sql", roots.admit("hf://friends/sql")).rank == 4


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """``hub_cache("owner/name", folder)`` puts an adapter into a cache laid out as the Hub's client does."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(id: str, source: Path) -> Path:
        repo = tmp_path / "hub" / f"models--{id.replace('/', '--')}"
        snapshot = repo / "snapshots" / ("0" * 40)
        (repo / "blobs").mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        snapshot.mkdir(parents=True)
        for number, file in enumerate(source.iterdir()):
            (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(repo / "blobs" / str(number))
        assert json.loads((snapshot / "adapter_config.json").read_text())["r"] == 4
        return snapshot

    return put
