"""A whole PPO iteration, by sparsity, population and backend; JAX's and Stable-Baselines3's."""

import pytest

from benchmarks.backends import device_of, swept
from benchmarks.peers import jax_ppo, sb3
from benchmarks.ppo_job import PPOJob, ppo_contender
from benchmarks.problems import SPARSITIES
from sparse_tickets.algos.ppo import PPO

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True)]


@pytest.mark.parametrize(("backend", "sparsity"), swept(SPARSITIES))
@pytest.mark.parametrize("tickets", [1, 60, 1024])
def bench_iteration(timed, backend, tickets, sparsity):
    timed(
        lambda: ppo_contender(
            PPOJob(tickets, sparsity, backend=backend, device=device_of(backend)), backend
        ),
        sparsity=sparsity,
        tickets=tickets,
    )


@pytest.mark.parametrize("tickets", [1, 60])
def bench_jax(timed, tickets):
    timed(lambda: jax_ppo.ppo(PPOJob(tickets, 90.0)), sparsity=90.0, tickets=tickets)


def bench_sb3(timed):
    timed(lambda: sb3.ppo(PPO(), "CartPole-v1"))
