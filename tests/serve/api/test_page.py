"""The playground's files: whole, closed to what comes from elsewhere, and without a way to turn text into code."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from rayft.config.serve import Serve
from rayft.serve import keys
from rayft.serve.routes.page import FOLDER


def test_the_page_is_served_with_all_that_it_names(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
    assert sorted(named) == ["page/app.js", "page/style.css"]
    for path, kind in zip(sorted(named), ("text/javascript", "text/css"), strict=True):
        file = http.get(f"/{path}")
        assert file.status_code == 200 and file.headers["content-type"].startswith(kind)
        assert file.text == (FOLDER / path.removeprefix("page/")).read_text()
    for path in ("/", *(f"/{path}" for path in named)):
        headers = http.head(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert http.get(path).status_code == 404


def test_text_stays_text_and_nothing_comes_from_elsewhere() -> None:
    html, script, style = ((FOLDER / name).read_text() for name in ("index.html", "app.js", "style.css"))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in script
    assert not re.search(r"\son\w+=|style=|<style|javascript:", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.S) == [""]
    for text in (html, script, style):
        assert not re.search(r"https?://|//\w+\.\w+/|@import|url\(", text)


def test_what_the_script_looks_for_is_on_the_page() -> None:
    ids = set(re.findall(r'\bid="([\w-]+)"', (FOLDER / "index.html").read_text()))
    wanted = set(re.findall(r'\bat\("([\w-]+)"\)', (FOLDER / "app.js").read_text()))
    assert wanted and wanted <= ids


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript(tmp_path: Path) -> None:
    file = tmp_path / "app.mjs"
    file.write_text((FOLDER / "app.js").read_text())
    assert subprocess.run(["node", "--check", file], capture_output=True).returncode == 0


def test_the_page_asks_for_the_key(server_of: Callable[..., str], tmp_path: Path) -> None:
    keys.add(tmp_path / "keys.json", "anna")
    url = server_of(Serve(api_keys=str(tmp_path / "keys.json")))
    for path in ("/", "/page/app.js", "/page/style.css"):
        assert httpx.get(url + path).status_code == 200
    assert httpx.get(f"{url}/v1/models").status_code == 401
