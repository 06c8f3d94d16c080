"""tests/slow.json: when each slow test last ran, and whether it has ever passed.

``--slow-ledger=record`` (make test-slow) writes one entry per slow test that ran. ``--slow-ledger=check`` (make test)
names the slow tests that were left out and fails when one of them has never passed.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

LEDGER = Path(__file__).with_name("slow.json")


class SlowLedger:
    """The pytest plugin. ``mode`` is ``check`` or ``record``."""

    def __init__(self, mode: str, path: Path = LEDGER) -> None:
        self.mode = mode
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self.left_out: list[str] = []
        self.slow: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.slow = {name_of(item) for item in items if is_slow(item)}

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.left_out += [name_of(item) for item in items if is_slow(item)]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """With pytest-xdist only its workers collect; each of them all tests."""
        self.left_out = node.workeroutput["left_out"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.mode != "record" or report.nodeid not in self.slow:
            return
        if report.when == "call" or report.failed:  # an error in set-up or tear-down fails the test as well
            self.record(report.nodeid, report.outcome, round(report.duration, 1))

    def record(self, test: str, outcome: str, seconds: float) -> None:
        entry: dict[str, Any] = {"test": test, "commit": commit(), "outcome": outcome, "seconds": seconds}
        passed = self.entries.get(test, {}).get("passed")
        entry["passed"] = {"commit": entry["commit"], "seconds": seconds} if outcome == "passed" else passed
        self.entries[test] = entry
        self.path.write_text(json.dumps(dict(sorted(self.entries.items())), indent=1) + "\n")

    def never_passed(self) -> list[str]:
        return sorted(test for test in self.left_out if not self.entries.get(test, {}).get("passed"))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = self.left_out
        if self.mode == "check" and session.exitstatus == pytest.ExitCode.OK and self.never_passed():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.mode != "check" or not self.left_out:
            return
        terminalreporter.section("slow tests that did not run (make test-slow)")
        missing = set(self.never_passed())
        for test in sorted(self.left_out):
            entry = self.entries.get(test, {})
            if test in missing:
                terminalreporter.line(f"NEVER PASSED  {test}", red=True)
            else:
                passed = entry["passed"]
                terminalreporter.line(f"passed at {passed['commit']} in {passed['seconds']} s  {test}")
        if missing:
            terminalreporter.line(f"{len(missing)} slow tests have never passed: run `make test-slow`", red=True)


def name_of(item: pytest.Item) -> str:
    """The test's id, without the group that pytest-xdist writes behind it."""
    group = item.get_closest_marker("xdist_group")
    return item.nodeid.removesuffix(f"@{group.args[0]}") if group else item.nodeid


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None and item.get_closest_marker("gpu") is None


def commit() -> str:
    """Short hash of HEAD, with ``+`` behind it when the tree holds uncommitted changes."""
    root = LEDGER.parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    dirty = [line for line in changes.stdout.splitlines() if not line.endswith(LEDGER.name)]
    return head.stdout.strip() + ("+" if dirty else "")
