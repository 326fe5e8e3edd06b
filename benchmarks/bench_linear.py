"""Layers and whole policies, by sparsity, shape, population, format, backend and peer.

    pytest benchmarks/bench_linear.py -m bench -k "cpu and act"

See `conftest.py`.
"""

import pytest

from benchmarks import ours
from benchmarks.ours import BACKENDS, device_of, swept
from benchmarks.peers import (
    loop_dense,
    masked_bmm,
    scipy_csr,
    sparseprop,
    torch_bsr,
    torch_compile,
    torch_csr,
    torch_dense,
    torch_func,
    torch_semi_structured,
)
from benchmarks.problems import SPARSITIES, LinearProblem, PolicyProblem

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

LAYERS = {  # P, B, I, O
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
}
# The reference has one format besides, and on a GPU the mask decides.
OURS = [
    (backend, format, sparsity)
    for format in FORMATS
    for backend, sparsity in swept(SPARSITIES)
    if backend == "cpu" or format in ("auto", "blocked")
]
BACKWARD = (torch_dense, masked_bmm, torch_csr, torch_bsr, sparseprop)
PEERS = [
    *((peer, "linear_forward") for peer in (*BACKWARD, torch_semi_structured, scipy_csr)),
    *((peer, "linear_backward") for peer in BACKWARD),
]
POLICIES = {  # P, B, sizes
    "one": (1, 128, (4, 64, 64, 2)),
    "population": (60, 128, (4, 64, 64, 2)),
    "crowd": (1024, 16, (4, 64, 64, 2)),
    "wide": (8, 128, (17, 256, 256, 6)),
}
# The nominal density that makes the CPU kernels run every layer in a format.
DENSITIES = {"auto": None, "dense": 1.0, "csr": 0.0}
OUR_POLICIES = [
    (backend, format, sparsity)
    for backend, format in (
        *((name, "auto") for name in BACKENDS),
        ("cpu", "dense"),
        ("cpu", "csr"),
    )
    for _, sparsity in swept(SPARSITIES, [backend])
]
POLICY_PEERS = (torch_dense, masked_bmm, torch_func, loop_dense)


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize(("backend", "format", "sparsity"), OURS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_layer(timed, backward, backend, format, shape, sparsity):
    """Forward alone, or with gradients for x, weight and bias."""

    def build():
        forced, block = FORMATS[format]
        problem = LinearProblem(*LAYERS[shape], sparsity, block=block, device=device_of(backend))
        make = ours.linear_backward if backward else ours.linear_forward
        return make(problem, backend, format=forced if backend == "cpu" else None)

    timed(build, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize(("peer", "op"), PEERS, ids=lambda of: getattr(of, "NAME", of))
def bench_layer_peer(timed, peer, op, shape, sparsity):
    timed(lambda: getattr(peer, op)(LinearProblem(*LAYERS[shape], sparsity)), sparsity=sparsity)


def _policy(shape, sparsity, device="cpu"):
    tickets, batch, sizes = POLICIES[shape]
    return PolicyProblem(tickets, batch, sizes, sparsity, device=device)


@pytest.mark.parametrize("shape", POLICIES)
@pytest.mark.parametrize(("backend", "format", "sparsity"), OUR_POLICIES)
def bench_policy(timed, backend, format, shape, sparsity):
    """Forward and backward to the weights."""

    def build():
        return ours.policy(_policy(shape, sparsity, device_of(backend)), backend, DENSITIES[format])

    timed(build, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", POLICIES)
@pytest.mark.parametrize("peer", POLICY_PEERS, ids=lambda peer: peer.NAME)
def bench_policy_peer(timed, peer, shape, sparsity):
    timed(lambda: peer.policy(_policy(shape, sparsity)), sparsity=sparsity)


@pytest.mark.parametrize("shape", POLICIES)
def bench_policy_compiled(timed, shape):
    timed(lambda: torch_compile.policy(_policy(shape, 90.0)), sparsity=90.0)
