"""Errors as clients see them: OpenAI's shape, its types and status codes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from rayft.errors import RayftError, UsageError
from rayft.inference.request import Overloaded

log = logging.getLogger("rayft.serve")

_SHOWN = 3
"""Problems of one request that its message names."""


class ApiError(UsageError):
    """A request that is refused, or that could not be answered.

    param: the field of the request that it is about. retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        id: str,
        message: str,
        hint: str | None = None,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(id, message, hint)
        self.param = param
        self.retry_after = retry_after


_STATUS = {
    "R420": 500,
    "R813": 429,
    "R815": 404,
    "R831": 404,
    "R832": 401,
    "R833": 403,
    "R834": 429,
    "R835": 413,
    "R836": 408,
    "R837": 499,
    "R838": 503,
    "R839": 500,
    "R840": 404,
    "R841": 405,
    "R842": 403,
    "R867": 503,
    "R000": 500,
}
"""What is not 400 for a UsageError and 500 for any other error. 499: the client has gone, and nobody reads it. R420, a
damaged registry, is not the fault of who sends a request."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "client_closed_request",
}

_CODES = {
    "R812": "context_length_exceeded",
    "R813": "server_overloaded",
    "R815": "model_not_found",
    "R831": "model_not_found",
    "R832": "invalid_api_key",
    "R833": "insufficient_permissions",
    "R834": "rate_limit_exceeded",
}
"""OpenAI's words where it has one; else the code is the error's id."""


def status_of(error: BaseException, more: Mapping[str, int] | None = None) -> int:
    """The HTTP status of an error. more: by id, for ids that the table here does not have."""
    if not isinstance(error, RayftError):
        return 500
    if isinstance(error, Overloaded):
        return 429
    usual = 400 if isinstance(error, UsageError) else 500
    return _STATUS.get(error.id, (more or {}).get(error.id, usual))


def shape_of(error: BaseException, more: Mapping[str, int] | None = None) -> dict[str, Any]:
    """OpenAI's body of an error. What rayft did not raise on purpose is not shown."""
    status = status_of(error, more)
    if not isinstance(error, RayftError):
        error = RayftError("R000", "something went wrong in the server; its log says what")
    message = f"{error.id}: {error.message}" + (f" ({error.hint})" if error.hint else "")
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = _CODES.get(error.id, error.id)
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}}


def reply(error: BaseException, more: Mapping[str, int] | None = None) -> Response:
    """The response that an error becomes. What rayft did not raise on purpose is logged."""
    if not isinstance(error, RayftError):
        log.error("a request failed", exc_info=error)
    status = status_of(error, more)
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = f"{max(1, round(getattr(error, 'retry_after', None) or 1))}"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(shape_of(error, more), status, headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON whatever the texts hold: half of a surrogate pair in a client's field must not fail its own error."""
    data = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(data, status, headers, "application/json")


def install(app: FastAPI, more: Mapping[str, int] | None = None) -> None:
    """Let every error of an application, its framework's too, have this shape. more: statuses of other ids."""

    async def own(request: Request, error: Exception) -> Response:
        return reply(error, more)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return reply(invalid(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = reply(_of_framework(request, error))
        if error.status_code == 405:
            response.headers["allow"] = ", ".join(_methods(request))
        return response

    app.add_exception_handler(RayftError, own)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, own)


def _of_framework(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError("R840", f"there is no route {request.method} {request.url.path}", "see /openapi.json")
    if error.status_code == 405:
        return ApiError("R841", f"{request.url.path} does not take {request.method}")
    return ApiError("R830", str(error.detail))


def _methods(request: Request) -> list[str]:
    """That some route takes under this path; the framework names those of the first one only."""
    scopes = {name: {**request.scope, "method": name} for name in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")}
    routes = request.app.routes
    return [name for name, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]


def invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's list of problems as one message, about the first field."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError("R830", f"the body is not JSON: {first.get('ctx', {}).get('error', 'malformed')}")
    if tuple(first["loc"]) == ("body",):
        if first["type"] == "missing":
            return ApiError("R830", "the request has no body")
        if first["type"] in ("model_attributes_type", "model_type", "dict_type", "list_type"):
            wanted = "list" if first["type"] == "list_type" else "object"
            return ApiError("R830", f"the body is one JSON {wanted}, sent with content-type: application/json")
    lines = list(dict.fromkeys(f"{place}: {_said(p)}" if (place := _place(p["loc"])) else _said(p) for p in problems))
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ApiError("R830", "; ".join(lines[:_SHOWN]) + more, param=_place(first["loc"]) or None)


def _said(problem: Mapping[str, Any]) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    short = isinstance(given, bool | int | float) or (isinstance(given, str) and len(given) <= 40)
    return f"{text}, {given!r:.60} was given" if short and problem["type"] != "missing" else text


def _place(place: Sequence[str | int]) -> str:
    """`messages[0].role` of ("body", "messages", 0, "role"); what names a branch of a union is left out."""
    text = ""
    for part in place[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "none", "lax", "strict"):
            text += f".{part}" if text else part
    return text
