"""pytest-benchmark over every case and op, one by one: ``pytest benchmarks -m bench -k prune``.

All together take hours; ``--benchmark-disable`` verifies and runs everything once. A result is
verified before it is timed. On a GPU the timer waits for the device, and ``triton_us`` beside it is
`triton.testing.do_bench`'s time, with cold caches. No speed-up comes from here: nobody takes turns.
That is what `python -m benchmarks run` does, with the same contenders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from sparse_tickets.timing import Contender

ROOT = Path(__file__).parents[1]
# At the end, so that the folder `kernels` shadows no installed package of that name.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="of cases: cpu or cuda")
    parser.addoption("--contender", default="", help="of cases: its name; default: ours")


def pytest_configure(config: pytest.Config) -> None:
    """Collect ``bench_*`` when this folder is asked for."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """Verify a contender, then time it; an unavailable peer skips with its reason."""
    from benchmarks.clock import make_timer
    from benchmarks.peers import Unavailable

    def run(build: Callable[[], Contender], device: str = "cpu", **extra: object) -> None:
        try:
            contender = build()
        except Unavailable as reason:
            pytest.skip(str(reason))
        if contender.error is not None:
            error = contender.error()
            assert error <= 1, f"{contender.name}: {error:.3g} times the error allowed"
            benchmark.extra_info["error"] = error
        benchmark.extra_info.update(contender=contender.name, plan=contender.plan, **extra)
        if device == "cpu":
            benchmark(contender.run)
            return
        timer = make_timer(torch.device(device))
        benchmark.extra_info["triton_us"] = 1e6 * timer.cold(contender.run)
        benchmark(lambda: (contender.run(), torch.cuda.synchronize()))

    return run
