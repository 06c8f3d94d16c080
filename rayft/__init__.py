"""rayft: from recipe to served adapter, nothing is lost and nothing changes silently."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rayft")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
