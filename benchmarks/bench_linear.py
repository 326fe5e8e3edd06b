"""The linear layer: forward and backward, by sparsity, shape, population, backend and peer."""

import pytest

from benchmarks import ours
from benchmarks.peers import masked_bmm, scipy_csr, torch_csr, torch_dense
from benchmarks.problems import SPARSITIES, LinearProblem

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

SHAPES = {  # P, B, I, O
    "act": (1, 1, 256, 256),
    "small": (1, 128, 64, 64),
    "batch": (1, 2048, 256, 256),
    "wide": (1, 64, 1024, 1024),
    "population": (60, 128, 64, 64),
}
FORWARD = {
    "ours": ours.linear_forward,
    "ours-reference": lambda problem: ours.linear_forward(problem, "reference"),
    "torch-dense": torch_dense.linear_forward,
    "torch-masked": masked_bmm.linear_forward,
    "torch-csr": torch_csr.linear_forward,
    "scipy-csr": scipy_csr.linear_forward,
}
BACKWARD = {
    "ours": ours.linear_backward,
    "ours-reference": lambda problem: ours.linear_backward(problem, "reference"),
    "torch-dense": torch_dense.linear_backward,
    "torch-masked": masked_bmm.linear_backward,
    "torch-csr": torch_csr.linear_backward,
}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contender", FORWARD)
def bench_forward(timed, contender, shape, sparsity):
    timed(lambda: FORWARD[contender](LinearProblem(*SHAPES[shape], sparsity)), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contender", BACKWARD)
def bench_forward_backward(timed, contender, shape, sparsity):
    timed(lambda: BACKWARD[contender](LinearProblem(*SHAPES[shape], sparsity)), sparsity=sparsity)
