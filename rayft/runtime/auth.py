"""Token authentication of a Ray cluster: find out within seconds whether it asks for a token and takes ours.

Ray itself finds out by retrying for 20 seconds (wrong token) or two minutes (nobody there) and then kills the process,
so rayft asks before it calls `ray.init`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

from rayft.errors import UsageError

MODE = "RAY_AUTH_MODE"
_TIMEOUT = 10.0


def token() -> str | None:
    """The token Ray would use: $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return value.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return file.read_text().strip() if file.is_file() else None


def wanted() -> bool:
    """Whether this process is told to use a token."""
    return os.environ.get(MODE, "").lower() == "token"


def settle(address: str) -> None:
    """Make this process talk to the cluster at ``host:port`` in the way the cluster asks for.

    Where RAY_AUTH_MODE is not set and the cluster wants a token, it is set to ``token``. Raises UsageError R501
    (nobody answers) or R502 (it wants a token that we do not have).
    """
    if not listens(address):
        raise UsageError(
            "R501",
            f"no Ray cluster answers at {address}",
            "check RAY_ADDRESS (host:port of the head, by default port 6379), or unset it to start Ray here",
        )
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # asking needs the cluster's certificates, which Ray handles itself
    if not wanted() and _ask(address, None) == "accepted":
        return
    ours = token()
    if ours is None or _ask(address, ours) == "refused":
        raise refused(address, ours is not None)
    if MODE not in os.environ:
        turn_on()
    elif not wanted():
        raise UsageError("R502", f"{address} asks for a token, but {MODE}={os.environ[MODE]}", f"set {MODE}=token")


def turn_on() -> None:
    """Use tokens in this process and its children. Ray reads its environment at import: make it read again."""
    os.environ[MODE] = "token"
    from ray._raylet import Config  # type: ignore[attr-defined]  # not in the stub that Ray ships

    Config.initialize("")


def refused(address: str, had_token: bool) -> UsageError:
    problem = "does not accept our token" if had_token else "asks for a token, and there is none here"
    return UsageError(
        "R502",
        f"{address} {problem}",
        "copy the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
    )


def listens(address: str) -> bool:
    """Whether somebody accepts connections at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT / 2):
            return True
    except (OSError, ValueError):
        return False


def _ask(address: str, secret: str | None) -> Literal["accepted", "refused"]:
    """Ask the head for its cluster id (an empty request) with or without a token."""
    import grpc

    metadata = [("authorization", f"Bearer {secret}")] if secret else []
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", metadata=metadata, timeout=_TIMEOUT)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return "refused"
            raise UsageError(
                "R501", f"what answers at {address} is no Ray head: {error.code().name}", "check RAY_ADDRESS"
            ) from error
    return "accepted"
