"""The playground in a real browser: a chat with two adapters side by side, by mouse and by keyboard."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayft.runs.registry import Registry
from rayft.serve import keys
from rayft.serve.assemble import assemble
from tests.serve.api.conftest import World, planned
from tests.serve.browser import CHROMIUM, opened

pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

TALKS = "[...document.querySelectorAll('.column')].map(c => [...c.querySelectorAll('.message')].map(m => m.innerText))"
IDLE = (
    "document.querySelectorAll('.message.assistant:not(.running)').length === {}"
    " && document.querySelector('#stop').disabled"
)
_SET = "(() => {{{{ const f = document.querySelector('{}'); f.value = {{}}; f.dispatchEvent(new Event('{}')); }}}})()"
SLIDE, FILL = _SET.format("#temperature", "input"), _SET.format("#key", "change")


@contextmanager
def site(world: World, folder: Path, api_keys: Path | None = None) -> Iterator[str]:
    """`live` answers with 85% anna and 15% bert; `orders` is carl."""
    registry = Registry(folder / "registry")
    registry.register("live", world.adapters["anna"].path, stage="production")
    registry.register("live", world.adapters["bert"].path, stage="staging")
    registry.weigh("live", {1: 0.85, 2: 0.15})
    registry.register("orders", world.adapters["carl"].path, stage="production")
    plan = planned(folder, api_keys=str(api_keys) if api_keys else None)
    with world.listening(assemble(plan, world.replica)) as url:
        yield url


def test_a_chat_with_two_adapters(world: World, tmp_path: Path) -> None:
    async def main(url: str) -> None:
        async with opened(url) as page:
            await page.until("document.querySelectorAll('.model').length === 3")
            assert await page.value("document.querySelector('#state').innerText") == "ready"
            assert await page.value("document.querySelector('.legend').innerText") == "v1 85% · v2 15%"
            shares = "[...document.querySelectorAll('.model:nth-child(2) .share')].map(s => s.className)"
            assert await page.value(shares) == ["share", "share canary"]
            await page.click(".model:nth-child(3) input")
            await page.value("document.querySelector('#tokens').value = 12")
            await page.value(SLIDE.format(0))
            assert await page.value("document.querySelector('#temperature-shown').innerText") == "0.0"
            await page.click("#question")
            await page.type("Please order <b>two</b> pizzas <img src=x onerror=alert(1)>")
            await page.press("Enter", 13, "\r")
            await page.until(IDLE.format(3))
            talks = await page.value(TALKS)
            assert [talk[0] for talk in talks] == ["Please order <b>two</b> pizzas <img src=x onerror=alert(1)>"] * 3
            question = [{"role": "user", "content": talks[0][0]}]
            for name, (_, answer) in zip(("tiny", "live", "orders"), talks, strict=True):
                version = await page.value("document.querySelectorAll('.badge')[1].innerText")
                model = name if name != "live" else f"live@{version.removeprefix('v')}"
                body = {"model": model, "messages": question, "max_tokens": 12, "temperature": 0}
                alone = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
                assert answer.strip() == alone["choices"][0]["message"]["content"].strip()
            speeds = await page.value("[...document.querySelectorAll('.speed')].map(s => s.innerText)")
            assert all("first after" in speed for speed in speeds) and any("tokens/s" in speed for speed in speeds)
            await page.type("And now?")
            await page.click("#send")
            await page.until(IDLE.format(6))
            assert [len(talk) for talk in await page.value(TALKS)] == [4, 4, 4]
            await page.screenshot(tmp_path / "light.png")
            assert await page.value("document.documentElement.scrollWidth <= innerWidth")
            await page.click("#fresh")
            assert await page.value(TALKS) == [[], [], []]
            assert await page.value("document.activeElement.id") == "question"
            assert page.complaints == []

    with site(world, tmp_path) as url:
        asyncio.run(main(url))
    assert (tmp_path / "light.png").stat().st_size > 10_000


def test_long_answers_are_stopped_by_the_keyboard(world: World, tmp_path: Path) -> None:
    async def main(url: str) -> None:
        async with opened(url, dark=True) as page:
            await page.until("document.querySelectorAll('.column').length === 2")
            await page.value("document.querySelector('#tokens').value = 1500")
            await page.value(SLIDE.format(2))
            await page.value("document.querySelector('#question').focus()")
            await page.type("Tell me all")
            await page.press("Enter", 13, "\r")
            await page.until("document.querySelectorAll('.message.running').length > 0")
            await page.until("document.querySelector('.message.running')?.innerText.length > 5")
            await page.screenshot(tmp_path / "dark.png")
            await page.press("Escape", 27)
            await page.until(IDLE.format(2))
            assert "stopped" in await page.value("document.body.innerText")
            assert page.complaints == []

    with site(world, tmp_path) as url:
        asyncio.run(main(url))
    assert world.idle


def test_a_server_with_keys_asks_for_one(world: World, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, admin = keys.add(file, "user"), keys.add(file, "boss", admin=True)

    async def main(url: str) -> None:
        async with opened(url) as page:
            await page.until("document.querySelector('#state').innerText === 'a key is needed'")
            await page.value(FILL.format(json.dumps(key)))
            await page.until("document.querySelector('#state').innerText === 'ready'")
            assert await page.value("document.querySelectorAll('.legend').length") == 0, "shares are for admins"
            await page.value("document.querySelector('#tokens').value = 4")
            await page.click("#question")
            await page.type("Hello")
            await page.press("Enter", 13, "\r")
            await page.until(IDLE.format(2))
            assert await page.value("document.querySelectorAll('.message.wrong').length") == 0
            await page.value(FILL.format(json.dumps(admin)))
            await page.until("document.querySelectorAll('.legend').length === 2")
            await page.value(FILL.format('"wrong"'))
            await page.until("document.querySelector('#state').innerText === 'a key is needed'")

    with site(world, tmp_path, file) as url:
        asyncio.run(main(url))


def test_a_narrow_screen(world: World, tmp_path: Path) -> None:
    async def main(url: str) -> Any:
        async with opened(url, width=420, height=800) as page:
            await page.until("document.querySelectorAll('.column').length === 2")
            await page.screenshot(tmp_path / "narrow.png")
            return await page.value("document.documentElement.scrollWidth <= innerWidth")

    with site(world, tmp_path) as url:
        assert asyncio.run(main(url))
