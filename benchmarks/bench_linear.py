"""The linear layer: forward and backward, by sparsity, shape, population, format, backend, peer."""

import pytest

from benchmarks import ours
from benchmarks.backends import device_of, swept
from benchmarks.peers import (
    masked_bmm,
    scipy_csr,
    sparseprop,
    torch_bsr,
    torch_csr,
    torch_dense,
    torch_semi_structured,
)
from benchmarks.problems import SPARSITIES, LinearProblem

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

SHAPES = {  # P, B, I, O
    "act": (1, 1, 256, 256),
    "small": (1, 128, 64, 64),
    "batch": (1, 2048, 256, 256),
    "wide": (1, 64, 1024, 1024),
    "population": (60, 128, 64, 64),
    "crowd": (1024, 16, 64, 64),
}
FORMATS = {  # what runs, and the size of the blocks that make up the mask
    "auto": (None, 1),
    "dense": ("dense", 1),
    "csr": ("sparse", 1),
    "blocked": ("sparse", 16),
    "packed": (None, 1),
}
# The reference has one format besides, and on a GPU the mask decides.
OURS = [
    (backend, format, sparsity)
    for format in FORMATS
    for backend, sparsity in swept(SPARSITIES)
    if backend == "cpu" or format in ("auto", "blocked", "packed")
]
FORWARD = (
    torch_dense,
    masked_bmm,
    torch_csr,
    torch_bsr,
    torch_semi_structured,
    scipy_csr,
    sparseprop,
)
BACKWARD = (torch_dense, masked_bmm, torch_csr, torch_bsr, sparseprop)


def _ours(backward, backend, format, shape, sparsity):
    forced, block = FORMATS[format]
    problem = LinearProblem(*SHAPES[shape], sparsity, block=block, device=device_of(backend))
    if format == "packed":
        return ours.linear_packed(problem, backend, backward=backward)
    make = ours.linear_backward if backward else ours.linear_forward
    return make(problem, backend, format=forced if backend == "cpu" else None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "format", "sparsity"), OURS)
def bench_forward(timed, backend, format, shape, sparsity):
    timed(lambda: _ours(False, backend, format, shape, sparsity), sparsity=sparsity)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "format", "sparsity"), OURS)
def bench_forward_backward(timed, backend, format, shape, sparsity):
    timed(lambda: _ours(True, backend, format, shape, sparsity), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", FORWARD, ids=lambda peer: peer.NAME)
def bench_forward_peer(timed, peer, shape, sparsity):
    timed(lambda: peer.linear_forward(LinearProblem(*SHAPES[shape], sparsity)), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", BACKWARD, ids=lambda peer: peer.NAME)
def bench_forward_backward_peer(timed, peer, shape, sparsity):
    timed(lambda: peer.linear_backward(LinearProblem(*SHAPES[shape], sparsity)), sparsity=sparsity)
