"""Tests on a GPU, shared out over processes: most of their time goes into compiling kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..results import available_cores
from .plugin import read_outcomes
from .process import DIED, ROOT, Work, compilers, say

__all__ = ["part", "run_tests", "summed_up"]

_QUIET = ("-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.plugin", "-W", "default")
_LEAST_S = 10.0
"""Pytest is not started for less."""


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
    """Run what pytest selects, each process its share of it, until the deadline.

    Args:
        selection: pytest's arguments.
        processes: how many at once.
        folder: of logs and outcomes, a file of each per process.
        deadline: by `time.monotonic`; what runs then is ended, and counts as not run.

    Returns:
        See `summed_up`.
    """
    with ThreadPoolExecutor(processes) as pool:
        shares = [
            pool.submit(_share, f"{index}/{processes}", selection, folder, deadline)
            for index in range(processes)
        ]
        return summed_up(share.result() for share in shares)


def _share(share: str, selection: Sequence[str], folder: Path, deadline: float) -> Path:
    """Run one share, anew behind every test that ended its process; returns its outcomes."""
    name = f"tests-{share.partition('/')[0]}"
    outcomes, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    command = [sys.executable, "-m", "pytest", *_QUIET, "--continue-on-collection-errors"]
    command += ["--share", share, "--outcomes", str(outcomes), *selection]
    before = -1
    # A process that got no further would get no further again.
    while (seen := _seen(outcomes)) > before and (left := deadline - time.monotonic()) > _LEAST_S:
        before = seen
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
            process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            break
        found = read_outcomes(outcomes)
        if not any("collected" in each for each in found):
            _write(outcomes, collection=f"share {share}", message=f"did not start, see {log}")
        for test in _begun(found):
            _write(outcomes, test=test, outcome="failed", message=DIED)
        if _left(read_outcomes(outcomes)) <= 0:
            break
    return outcomes


def summed_up(paths: Iterable[Path]) -> dict[str, Any]:
    """Counts, what failed with its reason, and how many tests did not run, from all outcomes."""
    failures: dict[str, str] = {}
    passed = skipped = unfinished = 0
    for path in paths:
        found = read_outcomes(path)
        failures |= {each["collection"]: each["message"] for each in found if "collection" in each}
        last = {each["test"]: each for each in found if "test" in each}
        passed += sum(each["outcome"] == "passed" for each in last.values())
        skipped += sum(each["outcome"] == "skipped" for each in last.values())
        failed = (each for each in last.values() if each["outcome"] == "failed")
        failures |= {each["test"]: each["message"] for each in failed}
        unfinished += max(0, _left(found)) + len(_begun(found))
    counts = {"passed": passed, "skipped": skipped, "unfinished": unfinished}
    return {**counts, "failures": failures}


def _begun(found: Sequence[dict[str, Any]]) -> list[str]:
    """Tests of which no end is known."""
    last = {each["test"]: each["outcome"] for each in found if "test" in each}
    return [test for test, outcome in last.items() if outcome == "begun"]


def _left(found: Sequence[dict[str, Any]]) -> int:
    """Tests that were not begun."""
    collected = sum(each.get("collected", 0) for each in found)
    return collected - len({each["test"] for each in found if "test" in each})


def _seen(path: Path) -> int:
    return len({each["test"] for each in read_outcomes(path) if "test" in each})


def _write(path: Path, **outcome: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(outcome) + "\n")
