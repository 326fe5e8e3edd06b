"""A whole policy forward and backward, by sparsity, width, population, format, backend and peer."""

import pytest

from benchmarks import ours
from benchmarks.peers import loop_dense, masked_bmm, torch_dense
from benchmarks.problems import SPARSITIES, PolicyProblem

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

SHAPES = {  # P, B, sizes
    "one": (1, 128, (4, 64, 64, 2)),
    "population": (60, 128, (4, 64, 64, 2)),
    "wide": (8, 128, (17, 256, 256, 6)),
}
CONTENDERS = {
    "ours": ours.policy,
    "ours-dense": lambda problem: ours.policy(problem, density=1.0),
    "ours-csr": lambda problem: ours.policy(problem, density=0.0),
    "ours-reference": lambda problem: ours.policy(problem, "reference"),
    "torch-dense": torch_dense.policy,
    "torch-masked": masked_bmm.policy,
    "torch-loop": loop_dense.policy,
}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_policy(timed, contender, shape, sparsity):
    tickets, batch, sizes = SHAPES[shape]
    timed(
        lambda: CONTENDERS[contender](PolicyProblem(tickets, batch, sizes, sparsity)),
        sparsity=sparsity,
    )
