"""The gradient norm that algorithms tell of an iteration."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets.algos import bc, dqn, ppo, sac
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.envs import open_env
from sparse_tickets.imp import dense_population
from sparse_tickets.kernels import use_backend
from sparse_tickets.population import Population
from sparse_tickets.sweep.spec import Sweep

pytestmark = pytest.mark.usefixtures("plain_torch")
FREE = 1e9
"""No gradient is clipped."""
ONCE = ppo.PPO(steps=4096, copies=2, horizon=16, epochs=1, minibatches=1, max_norm=FREE)
REPLAY = {"steps": 4096, "copies": 2, "horizon": 16, "updates": 1, "minibatch": 8, "warmup": 4}


def teach(count: int, inputs: int) -> bc.Dataset:
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(1, count, inputs, generator=generator)
    return bc.Dataset(obs, torch.randn(1, count, 2, generator=generator).log_softmax(-1))


def iteration(algo, env, population, key):
    if algo == "ppo":
        return ppo.Iteration(ONCE, env, population, key, 0)
    if algo == "bc":
        chosen = torch.zeros(len(key), dtype=torch.int64)
        return bc.Iteration(ONCE, population, key, teach(64, 4), chosen, 0)
    if algo == "dqn":
        return dqn.Iteration(dqn.DQN(**REPLAY, max_norm=FREE), env, population, key, 0)
    return sac.Iteration(sac.SAC(**REPLAY), env, population, key, 0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("algo", ["ppo", "bc", "dqn", "sac"])
def test_it_is_what_the_first_moments_are_of(algo, backend):
    env_name = "Pendulum-v1" if algo == "sac" else "CartPole-v1"
    spec = replace(Sweep(env=env_name), hidden=(8, 8), algos=(algo,))
    arena, key = spec.arena(algo), torch.arange(3) + 5
    dense = dense_population(arena, key, "lecun")
    mask = torch.rand(3, arena.prunable, generator=torch.Generator().manual_seed(1)) < 0.5
    population = Population.create(arena, dense.parameters.weight, mask, 0.5)
    with use_backend(backend), open_env(env_name, 3, 2) as env:
        iterate = iteration(algo, env, population, key)
        assert iterate.gradient_norm is None
        iterate.schedule(0)
        iterate()
    # One step from moments of zero: m = (1 - beta1) * gradient.
    expected = torch.linalg.vector_norm(population.parameters.m.double(), dim=1) / 0.1
    assert iterate.gradient_norm.shape == (3,)
    assert (expected > 0).all()
    torch.testing.assert_close(iterate.gradient_norm.double(), expected, rtol=1e-5, atol=0)


def test_nothing_is_said_before_the_first_update():
    spec = replace(Sweep(env="CartPole-v1"), hidden=(8, 8), algos=("dqn",))
    key = torch.arange(2)
    population = dense_population(spec.arena("dqn"), key, "lecun")
    settings = dqn.DQN(**REPLAY | {"warmup": 64})
    settings = replace(settings, steps=128)
    found = dqn.train(settings, "CartPole-v1", population, key, evaluation=Evaluation(4, 1, 1))
    assert found.gradient_norm_curve.isnan().tolist() == [[True, False, False, False]] * 2
