"""Headless Chromium through its debugging protocol: enough to use a page as a person does, and to look at it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.complaints: list[str] = []
        """What the console says of errors, refused contents included."""
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def listen(self) -> None:
        async for message in self.socket:
            event = json.loads(message.data)
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                self.complaints.append(event["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], 30)
        assert "error" not in answer, answer
        return answer["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, patience: float = 90) -> None:
        end = time.monotonic() + patience
        while not await self.value(expression):
            assert time.monotonic() < end, (expression, self.complaints, await self.value("document.body.innerText"))
            await asyncio.sleep(0.05)

    async def click(self, selector: str) -> None:
        """With a mouse, in the middle of the element."""
        where = f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        x, y = await self.value(where + " return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            pressed = {"text": text} if text and kind == "keyDown" else {}
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **pressed
            )

    async def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"]))


@asynccontextmanager
async def opened(url: str, width: int = 1280, height: int = 800, dark: bool = False) -> AsyncIterator[Page]:
    """A tab with this address."""
    assert CHROMIUM is not None
    folder = tempfile.mkdtemp(prefix="rayft-browser-")
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    arguments += ["--remote-debugging-port=0", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
    process = subprocess.Popen(
        [CHROMIUM, *arguments, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = await _port(Path(folder, "DevToolsActivePort"), process)
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as response:
                address = (await response.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=2**26) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await page.call("Emulation.setEmulatedMedia", features=[scheme])
                await page.call("Page.navigate", url=url)
                await page.until("location.protocol !== 'about:' && document.readyState === 'complete'")
                yield page
                listening.cancel()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


async def _port(file: Path, process: subprocess.Popen[bytes], patience: float = 60) -> int:
    end = time.monotonic() + patience
    while not (file.is_file() and file.read_text().strip()):
        assert process.poll() is None and time.monotonic() < end, "the browser does not start"
        await asyncio.sleep(0.05)
    return int(file.read_text().splitlines()[0])
