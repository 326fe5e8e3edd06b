"""pytest-benchmark over every op: ``pytest benchmarks/bench_linear.py -m bench -k "csr and act"``.

All files together take hours; ``--benchmark-disable`` verifies and runs everything once.
A result is verified before it is timed; what the two have in common with `python -m benchmarks` is
the contenders. Speed-ups come from the latter only: here nothing is interleaved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# At the end, so that the folder `kernels` shadows no installed package of that name.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    """Collect ``bench_*`` when this folder is asked for."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture
def timed(benchmark):
    """Verify a contender, then time it; an unavailable peer skips with its reason."""
    from benchmarks.peers import Unavailable

    def run(build: Callable, **extra: object) -> None:
        try:
            contender = build()
        except Unavailable as reason:
            pytest.skip(str(reason))
        if contender.error is not None:
            error = contender.error()
            assert error <= 1, f"{contender.name}: {error:.3g} times the error allowed"
            benchmark.extra_info["error"] = error
        benchmark.extra_info.update(contender=contender.name, plan=contender.plan, **extra)
        benchmark(contender.run)

    return run
