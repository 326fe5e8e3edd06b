"""A plugin of pytest for tests on a GPU: one share of them, an outcome written as each test ends.

    python -m pytest -p benchmarks.gpu.plugin --share 2/8 --outcomes share-2.jsonl tests/gpu ...

Tests of one function stay together, for they compile the same kernels. A test that never ends ends
its process, and so does one that leaves the device unusable: started again with the same file of
outcomes, the share goes on behind it. Where hypothesis is not installed, tests that draw from it
are skipped.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

__all__ = ["TEST_S", "read_outcomes"]

TEST_S = 90.0
"""No test takes this long, its compilation included."""

# The log, whatever pytest captures later.
_STDERR = os.dup(2)


class _Anything:
    """Stands in for strategies, which are built when a test is collected."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> _Anything:
        return self


def _without_hypothesis() -> ModuleType:
    stand_in = ModuleType("hypothesis")
    vars(stand_in).update(
        given=lambda *strategies, **named: pytest.mark.skip(reason="needs hypothesis"),
        settings=lambda **options: lambda test: test,
        strategies=_Anything(),
    )
    return stand_in


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = _without_hypothesis()


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """What a share wrote so far; a line that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="which part of the tests, e.g. 0/8 to 7/8")
    parser.addoption("--outcomes", type=Path, required=True, help="file of a line per test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Share(config), "share")


class _Share:
    def __init__(self, config: pytest.Config) -> None:
        self._index, self._count = map(int, config.getoption("--share").split("/"))
        self._path = config.getoption("--outcomes")
        self._begun = {each["test"] for each in read_outcomes(self._path) if "test" in each}

    def _write(self, **outcome: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(outcome) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        functions = list(dict.fromkeys(_function(item) for item in items))
        own = set(functions[self._index :: self._count])
        if not self._begun:
            self._write(collected=sum(_function(item) in own for item in items))
        items[:] = [
            item for item in items if _function(item) in own and item.nodeid not in self._begun
        ]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(collection=report.nodeid, message=_message(report))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write(test=item.nodeid, outcome="begun")
        faulthandler.dump_traceback_later(TEST_S, exit=True, file=_STDERR)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", message=_message(report))
            _leave_if_lost(report.nodeid)
        elif report.skipped or report.when == "call":
            self._write(test=report.nodeid, outcome=report.outcome)


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().split("\n")
    return (lines[0] if crash else lines[-1].removeprefix("E").strip())[:200]


def _leave_if_lost(test: str) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{test} left the device unusable: {error}")
