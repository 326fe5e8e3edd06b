"""Instructions per call under valgrind: free of noise, for changes too small to time.

Valgrind knows no AVX-512, so kernels are compiled for `_CPU` in a cache of their own, natively,
before the counted run loads them. That run is one process: it tells valgrind itself, by a client
request, when to count, so imports, set-up and the first call of each configuration are left out.
Counts compare two versions of the code on one machine, `python -m benchmarks compare` does; they
are no times.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from . import ours
from .peers import torch_dense
from .problems import LinearProblem, PolicyProblem
from .results import provenance, save

__all__ = ["CASES", "Valgrind", "count_instructions", "totals"]

_CPU = "haswell"
_CALLS = 8
# Of callgrind.h: 'C' and 'T' in the upper bytes, then the number of the request.
_DUMP, _ZERO, _START, _STOP = (0x43540000 + number for number in (0, 1, 4, 5))
# A client request on x86-64: rax points to it, rdx is the answer outside valgrind; then four
# rotations by 128 bits in all and an exchange of rbx with itself, nothing to a real processor.
_REQUEST = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")


def _linear(sparsity: float) -> LinearProblem:
    return LinearProblem(1, 256, 64, 64, sparsity)


def _policy(sparsity: float) -> PolicyProblem:
    return PolicyProblem(4, 64, sparsity=sparsity)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "torch dense, linear 64x64 B=256": lambda: torch_dense.linear_forward(_linear(90.0)).run,
    "linear 64x64 B=256, 90%": lambda: ours.linear_forward(_linear(90.0), format="sparse").run,
    "linear 64x64 B=256, 99%": lambda: ours.linear_forward(_linear(99.0), format="sparse").run,
    "policy P=4 B=64 fwd+bwd, dense": lambda: ours.policy(_policy(90.0), density=1.0).run,
    "policy P=4 B=64 fwd+bwd, 90%": lambda: ours.policy(_policy(90.0)).run,
}
"""Formats are forced: a choice by measurement would depend on the machine's mood."""


def count_instructions(console: Console, out: Path | None = None) -> int:
    """Count a few configurations, and keep the counts; the exit status is 1 without valgrind.

    Args:
        console: where to show them.
        out: the file; by default `results.default_path`.

    Raises:
        RuntimeError: the counted run failed; the message ends with what it printed.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None or platform.machine() != "x86_64":
        console.print(
            "[red]error:[/red] counting needs valgrind (apt-get install valgrind) on x86-64"
        )
        return 1
    began = time.perf_counter()
    run = provenance("instructions", "cpu", None)
    run.threads = 1
    with tempfile.TemporaryDirectory() as folder:
        console.print("compiling for the counted run...", style="dim")
        _child([], folder)
        console.print("counting...", style="dim")
        file = f"--callgrind-out-file={folder}/out"
        _child([valgrind, "--tool=callgrind", "--instr-atstart=no", file], folder)
        run.counts = {
            name: total / _CALLS for name, total in zip(CASES, totals(Path(folder)), strict=True)
        }
    run.seconds, run.complete = time.perf_counter() - began, True
    for name, count in run.counts.items():
        console.print(f"{name:36} {count:14,.0f} instructions per call", highlight=False)
    console.print(f"written to {save(run, out)}", highlight=False, soft_wrap=True)
    return 0


def totals(folder: Path) -> list[int]:
    """Instructions of each dump ``out.1``, ``out.2``... that callgrind left in a folder.

    Raises:
        RuntimeError: there is none, or one without a total.
    """
    dumps = sorted(folder.glob("out.*"), key=lambda path: int(path.suffix[1:]))
    found = [re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE) for path in dumps]
    if not dumps or None in found:
        raise RuntimeError(f"valgrind must leave totals, found {[path.name for path in dumps]}")
    return [int(match[1]) for match in found if match]


class Valgrind:
    """Client requests to callgrind; outside valgrind they do nothing."""

    def __init__(self) -> None:
        self._code = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self._code.write(_REQUEST)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(address)

    def count(self, work: Callable[[], object], calls: int) -> None:
        """Count ``calls`` of ``work`` in a dump of their own."""
        gc.collect()
        gc.disable()
        self._ask(_START)
        self._ask(_ZERO)
        for _ in range(calls):
            work()
        self._ask(_DUMP)
        self._ask(_STOP)
        gc.enable()

    def _ask(self, request: int) -> None:
        self._call((ctypes.c_ulong * 6)(request))


def _child(prefix: list[str], folder: str) -> None:
    """Run every configuration in a process of one thread."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": _CPU,
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": f"{folder}/cache",
        "NUMBA_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    command = [*prefix, sys.executable, "-m", "benchmarks.instructions"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    counter = Valgrind()
    for build in CASES.values():
        call = build()
        for _ in range(2):
            call()
        counter.count(call, _CALLS)
