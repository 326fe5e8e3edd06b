"""A whole PPO iteration, by sparsity, population and backend, and Stable-Baselines3's."""

import pytest

from benchmarks.backends import BACKENDS, device_of
from benchmarks.peers import sb3
from benchmarks.ppo_job import PPOJob, ppo_contender
from benchmarks.problems import SPARSITIES
from sparse_tickets.algos.ppo import PPO

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True)]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tickets", [1, 60, 1024])
@pytest.mark.parametrize("backend", BACKENDS)
def bench_iteration(timed, backend, tickets, sparsity):
    timed(
        lambda: ppo_contender(
            PPOJob(tickets, sparsity, backend=backend, device=device_of(backend)), backend
        ),
        sparsity=sparsity,
        tickets=tickets,
    )


def bench_sb3(timed):
    timed(lambda: sb3.ppo(PPO(), "CartPole-v1"))
