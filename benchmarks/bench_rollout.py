"""Acting: 128 steps of every ticket in four environment copies, by sparsity and population."""

import pytest

from benchmarks.backends import device_of, swept
from benchmarks.ours import on_backend
from benchmarks.ppo_job import PPOJob
from benchmarks.problems import SPARSITIES
from sparse_tickets.timing import Contender

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True)]


def _contender(backend, env_name, tickets, sparsity):
    job = PPOJob(tickets, sparsity, env_name=env_name, backend=backend, device=device_of(backend))
    return Contender(backend, *(on_backend(backend, f) for f in (job.act, job.acting_error)))


@pytest.mark.parametrize(("backend", "sparsity"), swept(SPARSITIES))
@pytest.mark.parametrize("tickets", [1, 60, 1024])
@pytest.mark.parametrize("env_name", ["CartPole-v1", "Acrobot-v1"])
def bench_rollout(timed, backend, env_name, tickets, sparsity):
    timed(lambda: _contender(backend, env_name, tickets, sparsity), sparsity=sparsity)
