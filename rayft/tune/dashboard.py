"""Optuna Dashboard beside a sweep."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rayft.config.tune import Tune
from rayft.errors import UsageError
from rayft.runs.folder import RunFolder
from rayft.tune.storage import JOURNAL

_SERVE = """
import sys
import optuna
from optuna_dashboard import run_server
url, host, port = sys.argv[1:]
if url.endswith(".journal"):
    backend = optuna.storages.journal.JournalFileBackend(url)
    storage = optuna.storages.JournalStorage(backend)
else:
    storage = optuna.storages.get_storage(url)
run_server(storage, host=host, port=int(port))
"""


@contextmanager
def running(tune: Tune, folder: RunFolder, say: Callable[[str, str], None]) -> Iterator[str]:
    """Serve the study on a free port of this machine while the block lasts; yields the address, which is also said.

    Raises UsageError R733 where optuna-dashboard is not installed.
    """
    if find_spec("optuna_dashboard") is None:
        raise UsageError("R733", "--dashboard needs optuna-dashboard", "pip install 'rayft[tune]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = tune.study_storage or str(folder.location.local / JOURNAL)
    command = [sys.executable, "-c", _SERVE, url, "127.0.0.1", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    say(f"Optuna Dashboard: {address}", "cyan")
    try:
        yield address
    finally:
        process.terminate()
        process.wait()
