"""Counter-based random numbers, by population and backend, against `torch.randn`."""

import pytest
import torch

from benchmarks.backends import BACKENDS, device_of
from benchmarks.ours import on_backend
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.random import normal, permutation, uniform
from sparse_tickets.timing import Contender, mismatch

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

COUNT = 4480
DRAWS = {"uniform": uniform, "normal": normal, "permutation": permutation}


def _contender(backend, name, tickets):
    key = torch.arange(tickets).to(device_of(backend))
    run = on_backend(backend, lambda: DRAWS[name](key, COUNT, stream=1, step=2))

    def error():
        with use_backend("reference"):
            wanted = DRAWS[name](key, COUNT, stream=1, step=2)
        drawn = run()
        drawn = drawn if drawn.is_floating_point() else drawn.double()
        return mismatch([drawn], [wanted.double()], 1)

    return Contender(backend, run, error)


@pytest.mark.parametrize("tickets", [1, 60, 1024])
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("backend", BACKENDS)
def bench_draw(timed, backend, name, tickets):
    timed(lambda: _contender(backend, name, tickets), tickets=tickets)


@pytest.mark.parametrize("tickets", [1, 60, 1024])
def bench_torch_randn(timed, tickets):
    target = torch.empty(tickets, COUNT)
    timed(lambda: Contender("torch.randn", target.normal_, None), tickets=tickets)
