"""Instructions per call under valgrind: free of noise, for changes too small to time.

Valgrind knows no AVX-512, so kernels are compiled for `_CPU` in a cache of their own, natively,
before a counted run loads them. Counting a run of one call and a run of several and dividing the
difference by the further calls leaves out imports and set-up. Counts compare two versions of the
code on one machine, `python -m benchmarks compare` does; they are no times.
"""

from __future__ import annotations

import os
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

__all__ = ["count_instructions"]

_CPU = "haswell"
_MORE = 8


def _linear(sparsity: float) -> LinearProblem:
    return LinearProblem(1, 256, 64, 64, sparsity)


def _policy(sparsity: float) -> PolicyProblem:
    return PolicyProblem(4, 64, sparsity=sparsity)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "torch dense, linear 64x64 B=256": lambda: torch_dense.linear_forward(_linear(90.0)).run,
    "linear 64x64 B=256, 90%": lambda: ours.linear_forward(_linear(90.0)).run,
    "linear 64x64 B=256, 99%": lambda: ours.linear_forward(_linear(99.0)).run,
    "policy P=4 B=64 fwd+bwd, dense": lambda: ours.policy(_policy(90.0), density=1.0).run,
    "policy P=4 B=64 fwd+bwd, 90%": lambda: ours.policy(_policy(90.0)).run,
}


def count_instructions(console: Console, out: Path | None = None) -> int:
    """Count a few configurations, and keep the counts; the exit status is 1 without valgrind.

    Args:
        console: where to show them.
        out: the file; by default `results.default_path`.

    Raises:
        RuntimeError: a counted run failed; the message ends with what it printed.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        console.print("[red]error:[/red] valgrind is not installed (apt-get install valgrind)")
        return 1
    began = time.perf_counter()
    run = provenance("instructions", "cpu", None)
    run.threads = 1
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            _child(name, 1, [], folder)
            counts = []
            for calls in (1, 1 + _MORE):
                command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
                counts.append(_collected(_child(name, calls, command, folder)))
            run.counts[name] = per_call = (counts[1] - counts[0]) / _MORE
            console.print(f"{name:36} {per_call:14,.0f} instructions per call", highlight=False)
    run.seconds, run.complete = time.perf_counter() - began, True
    console.print(f"written to {save(run, out)}", highlight=False, soft_wrap=True)
    return 0


def _child(name: str, calls: int, prefix: list[str], folder: str) -> str:
    """Run a configuration in a process of one thread; returns what it printed to stderr."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": _CPU,
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": f"{folder}/cache",
        "NUMBA_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    command = [*prefix, sys.executable, "-m", "benchmarks.instructions", name, str(calls)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stderr


def _collected(output: str) -> int:
    match = re.search(r"Collected : (\d+)", output)
    if match is None:
        raise RuntimeError(f"valgrind printed no count: {output[-2000:]}")
    return int(match[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    call = CASES[sys.argv[1]]()
    for _ in range(int(sys.argv[2])):
        call()
