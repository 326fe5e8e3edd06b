"""Learning curves of the fused CPU kernels are the reference backend's, within seed noise.

Both start from the same weights and draw the same random numbers, but rounding differs, and a
rollout in which one action differs goes another way from there. So curves are compared over seeds.
"""

from __future__ import annotations

import math

import pytest
import torch

from sparse_tickets.algos import ppo
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.envs import env_spec
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.prune import prune
from sparse_tickets.population import Population, initialise, policy_arena

SEEDS = 12
STEPS = 1 << 16
POINTS = 4


def curves(backend: str, density: float) -> torch.Tensor:
    """``[seeds, points]`` mean sampled returns of PPO on CartPole."""
    arena = policy_arena(env_spec("CartPole-v1"))
    key = torch.arange(SEEDS)
    with use_backend("reference"):
        weight = initialise(arena, key)
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(SEEDS, arena.prunable, generator=generator)
        full = torch.ones(SEEDS, arena.prunable, dtype=torch.bool)
        mask = prune(scores, full, round(density * arena.prunable))
    population = Population.create(arena, weight, mask, density)
    evaluation = Evaluation(points=POINTS, episodes=8, final_episodes=8)
    with use_backend(backend):
        result = ppo.train(
            PPO(steps=STEPS, learning_rate=1e-3),
            "CartPole-v1",
            population,
            key,
            evaluation=evaluation,
        )
    return result.curve_sampled.double()


@pytest.mark.slow
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_curves_differ_from_the_reference_s_by_seed_noise_alone(density) -> None:
    ours, reference = curves("cpu", density), curves("reference", density)
    assert ours.shape == reference.shape
    # A policy that acts at random holds the pole for some 22 steps.
    assert ours[:, -1].mean() > 100, "nothing was learnt, nothing is compared"
    variance = ours.var(0) + reference.var(0)
    errors = (variance / SEEDS).sqrt().clamp(min=1e-6)
    deviations = (ours.mean(0) - reference.mean(0)) / errors
    assert bool((deviations.abs() < 3.5).all()), deviations
    # Over the whole curve, where a small shift of every point would show.
    whole = ours.mean(1) - reference.mean(1)
    assert abs(whole.mean()) < 3 * math.sqrt(2) * whole.std() / math.sqrt(SEEDS)
