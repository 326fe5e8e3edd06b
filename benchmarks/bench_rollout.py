"""Acting: 128 steps of every ticket in four environment copies, by sparsity and population."""

from dataclasses import replace

import pytest

from benchmarks.backends import BACKENDS, device_of
from benchmarks.ours import on_backend
from benchmarks.ppo_job import PPOJob, ppo_contender
from benchmarks.problems import SPARSITIES

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True)]


def _contender(backend, env_name, tickets, sparsity):
    job = PPOJob(tickets, sparsity, env_name=env_name, backend=backend, device=device_of(backend))
    iteration = ppo_contender(job, backend)
    return replace(iteration, run=on_backend(backend, job.act))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tickets", [1, 60, 1024])
@pytest.mark.parametrize("env_name", ["CartPole-v1", "Acrobot-v1"])
@pytest.mark.parametrize("backend", BACKENDS)
def bench_rollout(timed, backend, env_name, tickets, sparsity):
    timed(lambda: _contender(backend, env_name, tickets, sparsity), sparsity=sparsity)
