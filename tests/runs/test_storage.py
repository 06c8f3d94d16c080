"""A file is complete or absent, on a file system and in a bucket (pyarrow's file:// and fsspec's memory://)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from rayft.errors import UsageError
from rayft.runs import storage
from rayft.runs.storage import Location, commit, is_committed, locate, staged, write_atomic


@pytest.fixture(params=["folder", "file-uri", "bucket", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """The same tests on a local path, the same as a URI, and a storage that is no file system."""
    roots = {"folder": str(tmp_path), "file-uri": f"file://{tmp_path}", "bucket": f"memory://{uuid.uuid4().hex}"}
    root = request.getfixturevalue("s3").uri(f"b/{uuid.uuid4().hex}") if request.param == "s3" else roots[request.param]
    location = locate(root)
    location.make_folder()
    assert location.is_local is (request.param in ("folder", "file-uri"))
    return location


def test_write_read_list_remove(place: Location) -> None:
    (place / "sub").make_folder()
    (place / "a.json").write(b"old")
    (place / "a.json").write(b"new")
    (place / "sub" / "b").write(b"xyz")
    assert (place / "a.json").read() == b"new"
    assert [child.name for child in place.children()] == ["a.json", "sub"]
    assert place.files() == {"a.json": 3, "sub/b": 3}
    assert (place / "sub").is_folder() and (place / "sub" / "b").is_file() and not (place / "c").exists()
    assert locate(str(place / "sub" / "b")).read() == b"xyz", "its text opens the same file"
    (place / "sub").remove()
    (place / "not there").remove()
    assert place.files() == {"a.json": 3}
    assert (place / "not there").children() == []


def test_rename_a_folder(place: Location) -> None:
    write_atomic(place / "run.json", "1") if place.is_local else (place / "run.json").write(b"1")
    (place / "one").make_folder()
    (place / "one" / "f").write(b"1")
    (place / "one").move_to(place / "two")
    assert not (place / "one").exists() and (place / "two").files() == {"f": 1}


def test_staged_folder_appears_whole_or_not_at_all(place: Location) -> None:
    target = place / "adapter"
    with pytest.raises(RuntimeError), staged(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not target.exists() and place.children() == []

    for content in ("first", "second"):
        with staged(target) as folder:
            (folder / "weights").write_text(content)
            assert not is_committed(target) or (target / "weights").read() == b"first"
    assert is_committed(target) and (target / "weights").read() == b"second"
    with pytest.raises(RuntimeError), staged(target) as folder:
        raise RuntimeError
    assert (target / "weights").read() == b"second", "what was there stays"


def test_commit_marks_a_folder(place: Location) -> None:
    (place / "x").make_folder()
    assert not is_committed(place / "x")
    commit(place / "x")
    assert is_committed(place / "x")


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "value"
    write_atomic(file, "0" * 100_000)
    writer = (
        "import sys; from rayft.runs.storage import write_atomic\n"
        "print('ready', flush=True)\n"
        "for n in range(10**9): write_atomic(sys.argv[1], str(n % 10) * 100_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for _ in range(50):
        text = file.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
    process.kill()
    process.wait()
    text = file.read_text()
    assert len(text) == 100_000 and len(set(text)) == 1


def test_lock_excludes_other_processes_and_ends_with_them(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from rayft.runs.storage import lock\n"
        "held = lock(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "l")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(UsageError, match="R406"):
        storage.lock(tmp_path / "l")
    process.kill()
    process.wait()
    start = time.monotonic()
    storage.lock(tmp_path / "l", timeout=5).release()
    assert time.monotonic() - start < 5


def test_bucket_refuses_what_needs_a_file_system() -> None:
    with pytest.raises(UsageError, match=r"R405.*bucket"):
        storage.lock("memory://somewhere/lock")


def test_unwritable_storage_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"R401.*cannot be written") as caught:
        storage.check_writable(locate(tmp_path / "file" / "runs"))
    assert caught.value.exit_code == 2 and "storage=" in (caught.value.hint or "")


def test_unknown_scheme_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"R415.*ftpx://"):
        locate("ftpx://host/runs")


def test_bucket_uri_keeps_its_query() -> None:
    location = locate("s3://bucket/runs?region=eu-west-1&endpoint_override=localhost:9000") / "quickstart"
    assert str(location) == "s3://bucket/runs/quickstart?region=eu-west-1&endpoint_override=localhost:9000"
    assert location.path == "bucket/runs/quickstart" and not location.is_local


def test_written_files_are_readable_by_others(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep" / "er" / "file", b"1")
    assert os.stat(tmp_path / "deep" / "er" / "file").st_mode & 0o777 == 0o644
