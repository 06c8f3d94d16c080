"""A vLLM server over HTTP: its routes as methods, its errors as ours. It knows neither names nor versions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from rayft.errors import RayftError, RunFailed, UsageError
from rayft.inference.request import Overloaded

_WAITS = aiohttp.ClientTimeout(total=None, sock_connect=10)
"""An answer may take as long as it takes; who hangs up closes the connection."""
_BRIEF = aiohttp.ClientTimeout(total=10)
HINT = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class UnknownModel(RayftError):
    """vLLM has no model of this name (any more)."""


class LoadsNone(UsageError):
    """This vLLM loads no adapters while it runs."""


class VllmClient:
    """Used in one event loop. `close` ends its connections."""

    def __init__(self, url: str) -> None:
        """url: `http://HOST:PORT`, with or without `/v1`."""
        self.url = address(url)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def healthy(self) -> bool:
        try:
            async with self._open().get(f"{self.url}/health", timeout=_BRIEF) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def models(self) -> list[dict[str, Any]]:
        """The entries of `/v1/models`. Raises UsageError R867."""
        return list(json.loads(await self._get("/v1/models"))["data"])

    async def metrics(self) -> str:
        """The text for Prometheus. Raises UsageError R867."""
        return await self._get("/metrics")

    async def load(self, name: str, path: str) -> None:
        """Raises UsageError: R866, vLLM refuses the adapter; R867, it does not answer or loads none while it runs."""
        status, text = await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if status == 200 or "already been loaded" in text:  # names say the content: it is the same adapter
            return
        message = _message(text)
        if (status in (404, 405) and "adapter" not in message) or "LoRA is not enabled" in message:
            raise LoadsNone("R867", f"the vLLM at {self.url} loads no adapters while it runs", HINT)
        raise UsageError("R866", f"vLLM does not take this adapter: {message}", "see docs/serving-vllm.md")

    async def unload(self, name: str) -> None:
        """One that is not there is no error. Raises UsageError R867."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def completions(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream, or the one body of what is none. Closing the iterator cancels the request.

        Raises:
            UsageError: R811, R817 (what vLLM says of the request), R867. Overloaded: R813. UnknownModel: R815.
            RunFailed: R839, vLLM failed.
        """
        answer = None
        try:
            answer = await self._open().post(f"{self.url}/v1/completions", json=body, timeout=_WAITS)
            if answer.status != 200:
                raise _refusal(answer.status, await answer.text(), body)
            if not body["stream"]:
                yield await answer.json()
                return
            async for line in answer.content:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip() or not data:
                    continue
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise _refusal(int(chunk["error"].get("code") or 500), data.decode(), body)
                yield chunk
            raise RunFailed("R839", f"the vLLM at {self.url} ended in the middle of an answer")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._silent(error) from error
        finally:
            if answer is not None:
                answer.close()  # vLLM frees what the request holds

    async def _get(self, path: str) -> str:
        try:
            async with self._open().get(self.url + path, timeout=_BRIEF) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._silent(error) from error
        if answer.status != 200:
            raise UsageError("R867", f"{self.url}{path} answers with {answer.status}", "is this a vLLM server?")
        return text

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        try:
            async with self._open().post(self.url + path, json=body, timeout=_WAITS) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> UsageError:
        return UsageError("R867", f"the vLLM at {self.url} does not answer: {error or type(error).__name__}")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # it belongs to the loop that runs now
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=2**20)
        return self._session


def address(url: str) -> str:
    """Without what belongs to routes."""
    return url.rstrip("/").removesuffix("/v1")


def _refusal(status: int, text: str, body: dict[str, Any]) -> RayftError:
    message = _message(text)
    if status == 404:
        return UnknownModel("R815", message)
    if status in (429, 503):
        return Overloaded("R813", f"vLLM takes no more requests for now: {message}", "try again later")
    if status >= 500:
        return RunFailed("R839", f"vLLM failed: {message}")
    grammar = "structured_outputs" in body and "grammar" in message.lower()
    return UsageError("R817" if grammar else "R811", f"vLLM refuses the request: {message}")


def _message(text: str) -> str:
    """Of a body in OpenAI's shape, or what else was sent."""
    try:
        body = json.loads(text)
        return str(body["error"]["message"] if isinstance(body["error"], dict) else body["error"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:300]
