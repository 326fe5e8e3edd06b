"""Masked Adam with per-ticket clipping, and rewinding, against torch's fused Adam."""

import pytest
import torch

from benchmarks.backends import BACKENDS, device_of, swept
from benchmarks.ours import on_backend
from benchmarks.problems import SPARSITIES, random_masks
from sparse_tickets.kernels import adam_, rewind_, use_backend
from sparse_tickets.timing import Contender, mismatch

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True)]

SHAPES = {  # P, N, size
    "one": (1, 4480, 8900),
    "population": (60, 4480, 8900),
    "crowd": (1024, 4480, 8900),
    "wide": (60, 70_000, 140_000),
}


class _Rows:
    """Weights, gradient and moments of P tickets."""

    def __init__(self, shape, sparsity, dtype=torch.float32, device="cpu"):
        tickets, prunable, size = shape
        generator = torch.Generator().manual_seed(0)
        self.mask = random_masks(tickets, prunable, sparsity, generator).to(device)
        rows = torch.randn(3, tickets, size, generator=generator).to(device, dtype)
        rows[:, :, :prunable].masked_fill_(~self.mask, 0)
        self.weight, self.grad, self.initial = rows.unbind()
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.step = torch.zeros(tickets, dtype=torch.int64, device=device)
        self.lr = torch.full((tickets,), 1e-3, device=device)

    def adam(self):
        adam_(self.weight, self.grad, self.m, self.v, self.step, self.lr, self.mask)
        return self.weight

    def rewind(self):
        rewind_(self.weight, self.initial, self.m, self.v, self.mask)
        return self.weight


def _ours(backend, op, shape, sparsity):
    device = device_of(backend)

    def error():
        fast, exact = (_Rows(shape, sparsity, t, device) for t in (torch.float32, torch.float64))
        got = on_backend(backend, getattr(fast, op))()
        with use_backend("reference"):
            return mismatch([got], [getattr(exact, op)()], shape[2])

    rows = _Rows(shape, sparsity, device=device)
    return Contender(backend, on_backend(backend, getattr(rows, op)), error)


def _torch_adam(shape, sparsity):
    """Fused Adam and one global clip: fewer norms than ours, and the mask only at the end."""
    rows = _Rows(shape, sparsity)
    weight = rows.weight.requires_grad_()
    weight.grad = rows.grad
    optimiser = torch.optim.Adam([weight], lr=1e-3, eps=1e-5, fused=True)

    def run():
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        optimiser.step()
        weight.detach()[:, : rows.mask.shape[1]].mul_(rows.mask)

    return Contender("torch fused Adam", run, None)


@pytest.mark.parametrize(("backend", "sparsity"), swept(SPARSITIES, [*BACKENDS, "torch"]))
@pytest.mark.parametrize("shape", SHAPES)
def bench_adam(timed, backend, shape, sparsity):
    if backend == "torch":
        timed(lambda: _torch_adam(SHAPES[shape], sparsity), sparsity=sparsity)
    else:
        timed(lambda: _ours(backend, "adam", SHAPES[shape], sparsity), sparsity=sparsity)


@pytest.mark.parametrize(("backend", "sparsity"), swept(SPARSITIES))
@pytest.mark.parametrize("shape", SHAPES)
def bench_rewind(timed, backend, shape, sparsity):
    timed(lambda: _ours(backend, "rewind", SHAPES[shape], sparsity), sparsity=sparsity)
