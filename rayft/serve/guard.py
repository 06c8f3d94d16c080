"""What every request passes before any route sees it: its key, its size, and whether it is JSON."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayft.serve.errors import ApiError, reply
from rayft.serve.keys import Keys, authenticate

MAX_BODY = 16 * 2**20
"""Bytes of a request's body."""


OPEN = frozenset({"/", "/page/app.js", "/page/style.css", "/health", "/ready"})
"""For everybody: whether the server lives, and a page that asks for a key."""


class Guard:
    """ASGI middleware. Bodies are read here, whole, and handed on in one piece."""

    def __init__(
        self, app: ASGIApp, keys: Keys | None = None, max_body: int = MAX_BODY, only_local: bool = False
    ) -> None:
        """keys: None = everybody may do everything. only_local: the server goes by this machine's own names only."""
        self.app, self.keys, self.max_body, self.only_local = app, keys, max_body, only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if self.keys is None:
                self._check_site(dict(scope["headers"]))
            authenticate(None if scope["path"] in OPEN else self.keys, scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await reply(error)(scope, receive, send)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _check_site(self, headers: Mapping[bytes, bytes]) -> None:
        """Without keys any page could have its reader's browser ask. The browser says whose page it is; a name that was
        made to point at this machine is none of its own. Raises ApiError R842."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise ApiError("R842", f"a page of {origin[:200]} may not ask this server", "use API keys, and no browser")
        if self.only_local and not is_loopback(_without_port(host)):
            raise ApiError("R842", f"this server does not go by the name {host[:200]!r}", "use API keys, or 127.0.0.1")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Raises ApiError R830 (not JSON), R835 (too large), R837 (the client has gone)."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError("R837", "the client has gone")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                raise self._too_large()
        if body and b"json" in headers.get(b"content-type", b""):
            try:  # Python's own reader takes NaN and halves of surrogate pairs, and nests until the stack ends
                from_json(bytes(body), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError("R830", f"the body is not JSON: {error}") from error
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError("R835", f"the body is longer than {self.max_body} bytes")


def _without_port(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other one reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
