"""Many adapters on one base behind an OpenAI-compatible endpoint on Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayft.serve.driver import Server, deploy
    from rayft.serve.offline import generate

__all__ = ["Server", "deploy", "generate"]


def __getattr__(name: str) -> Any:
    # The HTTP process imports this package too, and shall not import what starts a server.
    if name == "generate":
        from rayft.serve import offline

        return offline.generate
    if name in __all__:
        from rayft.serve import driver

        return getattr(driver, name)
    raise AttributeError(name)
