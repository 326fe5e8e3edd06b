"""Nothing is kept between calls: neither Python objects, nor the memory of tensors or scratch."""

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch

from sparse_tickets.envs import make_env
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.ppo import Batch, PPOConfig, ppo_update_
from sparse_tickets.kernels.rollout import rollout

_STATUS = Path("/proc/self/statm")
# What a dispatcher of Numba remembers levels off after some hundred calls, at this much.
_PYTHON_BYTES = 150_000
# 8 MB: one gradient or one rollout leaked per call would be at least 10 MB in any test here.
_PAGES = 2_000


def resident_pages():
    """Memory of the process, which tensors and NumPy's scratch are part of; 0 where unknown."""
    return int(_STATUS.read_text().split()[1]) if _STATUS.exists() else 0


def assert_nothing_leaks(work, calls):
    for _ in range(calls // 10):
        work()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(calls // 10):
            work()
        gc.collect()
        python, pages = tracemalloc.get_traced_memory()[0], resident_pages()
        for _ in range(calls):
            work()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - python < _PYTHON_BYTES
        assert resident_pages() - pages < _PAGES
    finally:
        tracemalloc.stop()


@pytest.mark.long
@pytest.mark.parametrize("calls", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_networks_forward_and_backward(density, calls):
    arena = Arena.build((4, 24, 24, 2))
    weight = torch.randn(4, arena.size).requires_grad_()
    mask = torch.rand(4, arena.prunable) < density
    x = torch.randn(4, 20, 4, requires_grad=True)
    dy = torch.randn(4, 20, 2)

    def work():
        y = mlp(x, weight, arena.actor, mask, density=density)
        torch.autograd.grad(y, (x, weight), dy)

    assert_nothing_leaks(work, calls)


@pytest.mark.long
def test_rollouts_and_updates():
    arena = Arena.build((4, 64, 64, 2), (4, 64, 64, 1))
    mask = torch.rand(4, arena.prunable) < 0.2
    weight = 0.1 * torch.randn(4, arena.size)
    weight[:, : arena.prunable] *= mask
    parameters = Parameters(
        weight, mask, torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros(4).long()
    )
    key = torch.arange(4)
    env = make_env("CartPole-v1", 4, 4)
    obs = env.reset(key)
    config = PPOConfig(epochs=1, minibatches=2)

    def work():
        nonlocal obs
        experience, obs = rollout(parameters, arena, env, obs, key, 32, density=0.2)
        samples = experience.flatten()
        batch = Batch(samples.obs, samples.action, samples.logp, *[samples.value] * 3)
        ppo_update_(parameters, arena, batch, key, 0, torch.full((4,), 1e-4), config, density=0.2)

    assert_nothing_leaks(work, 200)
