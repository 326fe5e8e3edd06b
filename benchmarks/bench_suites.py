"""Every case of the suites, one contender at a time, under pytest-benchmark.

    pytest benchmarks/bench_suites.py -m bench -k "linear and forward and 2048"
    pytest benchmarks/bench_suites.py -m bench --contender "torch CSR" --device cuda

See `conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.measure import Case, precision_of_torch
from benchmarks.suites import full, targets
from sparse_tickets.timing import Contender

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    cases = {case.label: case for case in (*full(device), *targets(device))}
    metafunc.parametrize("case", cases.values(), ids=cases)


def bench_case(timed: Callable[..., None], case: Case, request: pytest.FixtureRequest) -> None:
    """The contender of that name, or the subject."""
    name = request.config.getoption("--contender")

    def build() -> Contender:
        contest = case.build()
        found = [each for each in (contest.subject, *contest.peers) if name in ("", each.name)]
        if not found:
            pytest.skip(contest.skipped.get(name, f"{name} takes no part"))
        return found[0]

    with precision_of_torch(case.precision):
        timed(build, request.config.getoption("--device"), sparsity=case.sparsity)
