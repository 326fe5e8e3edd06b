"""Tests on a GPU, by pytest-xdist: most of their time goes into compiling kernels.

`run_tests` starts pytest with this module as a plugin, which writes an outcome as each test ends:
what a deadline cuts off is not lost. Each process begins with a stretch of the tests, for
neighbours compile the same kernels. One that never ends ends its process, and so does one that
leaves the device unusable; pytest-xdist counts it as failed and goes on in another.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..results import available_cores
from .process import ROOT, Work, compilers, say

TEST_S = 90.0
"""No test takes this long, its compilation included."""

_OPTIONS = [
    *("-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.tests", "-W", "default"),
    *("--dist", "worksteal", "--max-worker-restart", "1000", "--continue-on-collection-errors"),
]
# The log, whatever pytest captures later.
_STDERR = os.dup(2)


def part(work: Work) -> bool:
    """The tests marked gpu, and every test of a Triton kernel, which on a GPU run there."""
    selection = ["tests/gpu", "tests/kernels", "-k", "gpu or triton"]
    selection += ["-m", "not slow and not bench"]
    processes = max(1, available_cores() - compilers())
    if work.rehearse:
        selection, processes = ["tests/kernels/test_returns.py", "-k", "triton"], 2
    work.found.update(run_tests(selection, processes, work.folder, work.deadline))
    for name, reason in work.found["failures"].items():
        say(f"{name}: {reason}")
    return False


def run_tests(
    selection: Sequence[str], processes: int, folder: Path, deadline: float
) -> dict[str, Any]:
    """Run what pytest selects until the deadline.

    Args:
        selection: pytest's arguments.
        processes: how many at once.
        folder: of the log and the outcomes.
        deadline: by `time.monotonic`; what runs then is ended, and counts as not run.

    Returns:
        See `summed_up`.
    """
    outcomes, log = folder / "tests.jsonl", folder / "tests.log"
    command = [sys.executable, "-m", "pytest", *_OPTIONS, "-n", f"{processes}"]
    command += ["--outcomes", str(outcomes), *selection]
    with log.open("ab") as file:
        # In the group of this process: whoever ends that ends these too.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return summed_up(outcomes, log)


def summed_up(outcomes: Path, log: Path) -> dict[str, Any]:
    """Counts, what failed with its reason, and how many tests did not run."""
    found = _read(outcomes)
    collected = max((each["collected"] for each in found if "collected" in each), default=0)
    failures = {each["collection"]: each["message"] for each in found if "collection" in each}
    if not collected and not failures:
        failures["all"] = f"did not start, see {log}"
    ended: dict[str, dict[str, Any]] = {}
    for each in found:
        # One that fails may fail again at its end.
        if "test" in each and ended.get(each["test"], {}).get("outcome") != "failed":
            ended[each["test"]] = each
    kinds = [each["outcome"] for each in ended.values()]
    failures |= {
        test: each["message"] for test, each in ended.items() if each["outcome"] == "failed"
    }
    return {
        "passed": kinds.count("passed"),
        "skipped": kinds.count("skipped"),
        "unfinished": max(0, collected - len(ended)),
        "failures": failures,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """What was written so far; a line that was cut off is left out."""
    found = []
    for line in path.read_text(errors="replace").split("\n") if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


# What follows runs in pytest: a process that writes outcomes, and its workers.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="file of a line per test")


def pytest_configure(config: pytest.Config) -> None:
    works = hasattr(config, "workerinput")
    config.pluginmanager.register(_TestWorker() if works else _Writer(config.getoption("outcomes")))


class _TestWorker:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        faulthandler.dump_traceback_later(TEST_S, exit=True, file=_STDERR)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After a failure was told, look whether the device still works."""
        import torch

        if not report.failed or not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, **outcome: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(outcome) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._write(collected=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(collection=report.nodeid, message=_message(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", message=_message(report))
        elif report.skipped or report.when == "call":
            self._write(test=report.nodeid, outcome=report.outcome)


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().split("\n")
    return (lines[0] if crash else lines[-1].removeprefix("E").strip())[:200]
