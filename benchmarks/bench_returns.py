"""Advantages of a PPO batch, by population and backend. No weights, and so no sparsity."""

import pytest
import torch

from benchmarks.backends import BACKENDS, device_of
from benchmarks.ours import on_backend
from sparse_tickets.kernels import gae, use_backend
from sparse_tickets.timing import Contender, mismatch

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

STEPS, COPIES = 128, 4


def _contender(backend, tickets):
    generator = torch.Generator().manual_seed(0)
    shape = (tickets, STEPS, COPIES)
    values = torch.randn(3, *shape, generator=generator).to(device_of(backend))
    ended = torch.rand(2, *shape, generator=generator).to(device_of(backend)) < 0.02

    def run():
        return gae(*values, *ended, 0.99, 0.95)

    def error():
        with use_backend("reference"):
            exact = gae(*values.double(), *ended, 0.99, 0.95)
        return mismatch(on_backend(backend, run)(), exact, STEPS)

    return Contender(backend, on_backend(backend, run), error)


@pytest.mark.parametrize("tickets", [1, 60, 1024])
@pytest.mark.parametrize("backend", BACKENDS)
def bench_gae(timed, backend, tickets):
    timed(lambda: _contender(backend, tickets), tickets=tickets)
