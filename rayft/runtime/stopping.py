"""How a driver can be stopped: signals ask for it in the main thread, and the work is done in another."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def stoppable(ask: Callable[[], object]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls ``ask``, to save and end; the second one ends this process at once.

    ``ask`` must not wait for an answer. In a thread other than the main one (a notebook's, a sweep's) signals stay as
    they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask_to_stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ask()

    former = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def in_thread(work: Callable[[], Result], meanwhile: Callable[[], object] = lambda: None) -> Result:
    """Run ``work`` in a thread and wait, calling ``meanwhile`` five times a second.

    Ray Train's and Ray Tune's own handlers for Ctrl-C, which abort without saving, are set only in the main thread, and
    signals reach the main thread only while it waits in Python.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        meanwhile()
    if errors:
        raise errors[0]
    return results[0]
