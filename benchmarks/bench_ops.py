"""What no case of the suites is about, by backend, population and sparsity; see `conftest.py`.

pytest benchmarks/bench_ops.py -m bench -k "rows and cpu"
pytest benchmarks/bench_ops.py -m bench -k update --benchmark-timer time.process_time
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.ours import BACKENDS, device_of, on_backend, swept
from benchmarks.ppo_job import PPOJob, ppo_contender
from benchmarks.problems import SPARSITIES, random_masks
from sparse_tickets.kernels import adam_, gae, rewind_, use_backend
from sparse_tickets.kernels.random import normal, permutation, uniform
from sparse_tickets.timing import Contender, mismatch

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True)]

POPULATIONS = pytest.mark.parametrize("tickets", [1, 60, 1024])
EVERYWHERE = pytest.mark.parametrize("backend", BACKENDS)
SWEPT = pytest.mark.parametrize(("backend", "sparsity"), swept(SPARSITIES))
WEIGHTS = {  # P, N, size
    "one": (1, 4480, 8900),
    "population": (60, 4480, 8900),
    "crowd": (1024, 4480, 8900),
    "wide": (60, 70_000, 140_000),
}
SHAPES = pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
DRAWN = 4480
DRAWS = {"uniform": uniform, "normal": normal, "permutation": permutation}


def _job(backend, tickets, sparsity, **options):
    return PPOJob(tickets, sparsity, backend=backend, device=device_of(backend), **options)


@SWEPT
@POPULATIONS
@pytest.mark.parametrize("env_name", ["CartPole-v1", "Acrobot-v1"])
def bench_rollout(timed, backend, env_name, tickets, sparsity):
    """Acting: 128 steps of every ticket in four copies of the environment."""

    def build():
        job = _job(backend, tickets, sparsity, env_name=env_name)
        return Contender(backend, *(on_backend(backend, f) for f in (job.act, job.acting_error)))

    timed(build, device_of(backend), sparsity=sparsity)


@SWEPT
@POPULATIONS
def bench_ppo_update(timed, backend, tickets, sparsity):
    """All epochs and minibatches of one batch, again and again."""

    def build():
        job = _job(backend, tickets, sparsity)
        contender = ppo_contender(job, backend)
        with use_backend(backend):
            batch = job.prepare(job.act())
        update = on_backend(backend, lambda: job.update(batch))
        return Contender(backend, update, contender.error, plan=contender.plan)

    timed(build, device_of(backend), sparsity=sparsity)


@EVERYWHERE
@POPULATIONS
def bench_gae(timed, backend, tickets):
    """Advantages of a PPO batch. No weights, and so no sparsity."""
    generator, shape = torch.Generator().manual_seed(0), (tickets, 128, 4)
    values = torch.randn(3, *shape, generator=generator).to(device_of(backend))
    ended = torch.rand(2, *shape, generator=generator).to(device_of(backend)) < 0.02
    run = on_backend(backend, lambda: gae(*values, *ended, 0.99, 0.95))

    def error():
        with use_backend("reference"):
            return mismatch(run(), gae(*values.double(), *ended, 0.99, 0.95), 128)

    timed(lambda: Contender(backend, run, error), device_of(backend))


@EVERYWHERE
@POPULATIONS
@pytest.mark.parametrize("name", DRAWS)
def bench_draw(timed, backend, name, tickets):
    """Counter-based random numbers."""
    key = torch.arange(tickets).to(device_of(backend))
    run = on_backend(backend, lambda: DRAWS[name](key, DRAWN, stream=1, step=2))

    def error():
        with use_backend("reference"):
            wanted = DRAWS[name](key, DRAWN, stream=1, step=2)
        drawn = run()
        drawn = drawn if drawn.is_floating_point() else drawn.double()
        return mismatch([drawn], [wanted.double()], 1)

    timed(lambda: Contender(backend, run, error), device_of(backend))


@POPULATIONS
def bench_draw_torch(timed, tickets):
    timed(lambda: Contender("torch.randn", torch.empty(tickets, DRAWN).normal_, None))


class _Step:
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


@SWEPT
@SHAPES
@pytest.mark.parametrize("op", ["adam", "rewind"])
def bench_rows(timed, op, backend, shape, sparsity):
    """Masked Adam with clipping by ticket; setting weights back."""
    device = device_of(backend)

    def error():
        fast, exact = (_Step(shape, sparsity, t, device) for t in (torch.float32, torch.float64))
        got = on_backend(backend, getattr(fast, op))()
        with use_backend("reference"):
            return mismatch([got], [getattr(exact, op)()], shape[2])

    def build():
        rows = _Step(shape, sparsity, device=device)
        return Contender(backend, on_backend(backend, getattr(rows, op)), error)

    timed(build, device_of(backend), sparsity=sparsity)


@SHAPES
def bench_rows_torch_adam(timed, shape):
    """Fused Adam and one global clip: fewer norms than ours, and the mask only at the end."""

    def build():
        rows = _Step(shape, 90.0)
        weight = rows.weight.requires_grad_()
        weight.grad = rows.grad
        optimiser = torch.optim.Adam([weight], lr=1e-3, eps=1e-5, fused=True)

        def run():
            torch.nn.utils.clip_grad_norm_([weight], 0.5)
            optimiser.step()
            weight.detach()[:, : rows.mask.shape[1]].mul_(rows.mask)

        return Contender("torch fused Adam", run, None)

    timed(build, sparsity=90.0)
