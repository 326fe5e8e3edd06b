"""A whole policy forward and backward, by sparsity, width, population, format, backend, peer."""

import pytest

from benchmarks import ours
from benchmarks.backends import BACKENDS, device_of, swept
from benchmarks.peers import loop_dense, masked_bmm, torch_compile, torch_dense, torch_func
from benchmarks.problems import SPARSITIES, PolicyProblem

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

SHAPES = {  # P, B, sizes
    "one": (1, 128, (4, 64, 64, 2)),
    "population": (60, 128, (4, 64, 64, 2)),
    "crowd": (1024, 16, (4, 64, 64, 2)),
    "wide": (8, 128, (17, 256, 256, 6)),
}
# The nominal density that makes the CPU kernels run every layer in a format.
FORMATS = {"auto": None, "dense": 1.0, "csr": 0.0}
OURS = [
    *((backend, "auto") for backend in BACKENDS),
    ("cpu", "dense"),
    ("cpu", "csr"),
]
SWEPT = [(*ours, sparsity) for ours in OURS for _, sparsity in swept(SPARSITIES, ours[:1])]
PEERS = (torch_dense, masked_bmm, torch_func, loop_dense)


def _problem(shape, sparsity, device="cpu"):
    tickets, batch, sizes = SHAPES[shape]
    return PolicyProblem(tickets, batch, sizes, sparsity, device=device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "format", "sparsity"), SWEPT)
def bench_policy(timed, backend, format, shape, sparsity):
    def build():
        problem = _problem(shape, sparsity, device_of(backend))
        return ours.policy(problem, backend, FORMATS[format])

    timed(build, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.NAME)
def bench_policy_peer(timed, peer, shape, sparsity):
    timed(lambda: peer.policy(_problem(shape, sparsity)), sparsity=sparsity)


@pytest.mark.parametrize("shape", SHAPES)
def bench_policy_compiled(timed, shape):
    timed(lambda: torch_compile.policy(_problem(shape, 90.0)), sparsity=90.0)
