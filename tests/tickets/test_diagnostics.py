"""Dormant units, rank and norm against their definitions, whatever tickets share the batch."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets import diagnostics, register_env
from sparse_tickets.diagnostics import (
    dormant_share,
    effective_rank,
    hidden_features,
    mask_overlap,
    parameter_norm,
    random_observations,
)
from sparse_tickets.envs import GymEnv, gym_spec, registry
from sparse_tickets.kernels import Arena
from sparse_tickets.population import Population, initialise

ARENA = Arena.build((4, 24, 16, 2), (4, 24, 16, 1))


@pytest.fixture(scope="module")
def obs():
    return random_observations("CartPole-v1")


def rows(tickets, density=0.3):
    """Weights whose first layer sees less and less, so that units fall silent."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(tickets, ARENA.prunable, generator=generator) < density
    return Population.create(ARENA, initialise(ARENA, torch.arange(tickets)), mask).parameters


def test_features_are_those_of_plain_layers(obs):
    weight = rows(3).weight
    features = hidden_features(weight, ARENA.actor, obs)
    assert [layer.shape for layer in features] == [(3, len(obs), 24), (3, len(obs), 16)]
    for ticket, row in enumerate(weight):
        x = obs
        for (matrix, bias), found in zip(ARENA.actor.layers(row[None]), features, strict=False):
            x = torch.tanh(torch.nn.functional.linear(x, matrix[0], bias[0]))
            torch.testing.assert_close(found[ticket], x)


def test_dormant_units_are_counted_by_their_definition():
    silent = torch.tensor([[[1.0, 0.0, 0.05]], [[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]]])
    loud = torch.full((3, 1, 1), 2.0)
    # Means of 0.35, 1 and 0: units at most at a tenth of it are dormant.
    assert dormant_share([silent, loud]).tolist() == [1 / 4, 0.0, 3 / 4]
    assert dormant_share([silent, loud], tau=0.2).tolist() == [2 / 4, 0.0, 3 / 4]
    # Activations of either sign keep a unit awake.
    signs = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]])
    assert dormant_share([signs]).tolist() == [0.0]
    silent[0, 0, 0] = torch.nan
    assert np.isnan(dormant_share([silent])[0])
    with pytest.raises(ValueError, match="at least one hidden layer"):
        dormant_share([])


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_rank_of_features_of_known_rank(rank, generator):
    left = torch.linalg.qr(torch.randn(50, 8, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    features = (left[:, :rank] @ right[:rank])[None]
    assert effective_rank(features).tolist() == [rank]


def test_rank_counts_singular_values_up_to_all_but_a_hundredth():
    features = torch.diag_embed(torch.tensor([[90.0, 9.1, 0.9], [90.0, 8.0, 2.0]]))
    assert effective_rank(features).tolist() == [2, 3]
    assert effective_rank(features, delta=0.2).tolist() == [1, 1]
    features[0, 0, 0] = torch.inf
    assert effective_rank(features)[0].isnan()
    assert effective_rank(features)[1] == 3
    assert effective_rank(features[:, :0]).isnan().all()


def test_norm_is_of_the_policy_alone():
    arena, weight = ARENA, rows(2).weight.clone()
    parts = [part[1].flatten() for layer in arena.actor.layers(weight) for part in layer]
    expected = torch.cat(parts).double().square().sum().sqrt()
    torch.testing.assert_close(parameter_norm(weight, arena.actor)[1], expected)
    for matrix, bias in arena.critic.layers(weight):
        matrix.fill_(7.0)
        bias.fill_(7.0)
    torch.testing.assert_close(parameter_norm(weight, arena.actor)[1], expected)
    assert parameter_norm(weight[:0], arena.actor).shape == (0,)


def test_overlap_of_masks():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    other = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    assert mask_overlap(mask, other).tolist() == [1 / 3, 0.0, 1.0, 0.75]
    with pytest.raises(ValueError, match="other must have shape"):
        mask_overlap(mask, other[:, :2])
    with pytest.raises(TypeError, match="other must"):
        mask_overlap(mask, other.float())


@pytest.mark.parametrize("at_once", [1, 5])
def test_nothing_depends_on_the_tickets_beside(at_once, obs):
    weight = rows(15).weight

    def measured(some):
        features = hidden_features(some, ARENA.actor, obs)
        return torch.stack(
            [
                dormant_share(features),
                effective_rank(features[-1]),
                parameter_norm(some, ARENA.actor),
            ]
        )

    together = measured(weight)
    apart = torch.cat([measured(part) for part in weight.split(at_once)], 1)
    assert torch.equal(together, apart)
    assert len(together[0].unique()) > 1
    assert len(together[1].unique()) > 1


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_observations_are_always_the_same_ones(env):
    found = random_observations(env)
    width = registry.env_spec(env).observation_dim
    assert found.shape == (1024, width)
    assert found.isfinite().all()
    assert (found.std(0) > 0).all()
    diagnostics._drawn.cache_clear()
    assert torch.equal(found, random_observations(env))
    found.fill_(0.0)
    assert random_observations(env).any()


class Falling(gymnasium.Env):
    """Shows infinity from the third step on; its action knows no bounds."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(
        np.float32([-np.inf, 0, 0]), np.float32([np.inf, 9, np.inf])
    )

    def __init__(self):
        self.seen = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.float32([0.0]), {}

    def step(self, action):
        self.seen.append(action)
        self.time += 1
        return np.float32([0.0 if self.time < 3 else np.inf]), 0.0, False, self.time == 5, {}


def test_observations_that_are_not_finite_are_left_out(monkeypatch):
    made = []

    def make():
        made.append(Falling())
        return made[-1]

    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    spec = gym_spec(make, "Falling", pilot_steps=0)
    register_env("Falling", partial(GymEnv, make), spec)
    made.clear()
    found = random_observations("Falling")
    assert 0 < len(found) < 1024
    assert found.isfinite().all()
    actions = np.array([action for env in made for action in env.seen])
    assert len(actions) == 32 * 128
    assert (np.abs(actions[:, [0, 2]]) <= 1).all()
    assert (actions[:, 2] >= 0).all()
    assert actions[:, 1].min() >= 0
    assert 8 < actions[:, 1].max() <= 9
