"""Pruning to exactly k: the next level's mask from trained weights, against `torch.topk`."""

import pytest
import torch

from benchmarks.backends import BACKENDS, device_of, swept
from benchmarks.ours import on_backend
from benchmarks.problems import SPARSITIES, density_of, random_masks
from sparse_tickets.kernels.prune import prune, reference
from sparse_tickets.timing import Contender

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]


def _contender(name, tickets, prunable, sparsity):
    generator, device = torch.Generator().manual_seed(0), device_of(name)
    scores = torch.rand(tickets, prunable, generator=generator).to(device)
    mask = random_masks(tickets, prunable, sparsity, generator).to(device)
    k = torch.full((tickets,), int(0.8 * density_of(sparsity) * prunable), device=device)

    def by_topk():
        best = torch.where(mask, scores, -1.0).topk(int(k[0]), dim=1).indices
        return torch.zeros_like(mask).scatter_(1, best, True)

    # Wrong entries: none are allowed.
    def error():
        return float((run() != reference.prune(scores, mask, k)).sum()) * 2

    run = by_topk if name == "topk" else on_backend(name, lambda: prune(scores, mask, k))
    return Contender(name, run, error)


@pytest.mark.parametrize(("name", "sparsity"), swept(SPARSITIES, [*BACKENDS, "topk"]))
@pytest.mark.parametrize(
    ("tickets", "prunable"), [(1, 4480), (60, 4480), (1024, 4480), (60, 70_000)]
)
def bench_prune(timed, name, tickets, prunable, sparsity):
    timed(lambda: _contender(name, tickets, prunable, sparsity), sparsity=sparsity)
