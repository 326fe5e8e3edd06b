"""Sparsity during training in populations: each ticket by itself, critics apart where asked."""

import math

import pytest
import torch

from sparse_tickets.algos import ppo
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.dynamic import METHODS, Method, PopulationPruner, Pruning
from sparse_tickets.envs import env_spec
from sparse_tickets.population import Population, initialise, policy_arena

SETTINGS = ppo.PPO(steps=6 * 64, copies=4, horizon=16, minibatches=2, epochs=2)


def tickets(index: list[int]) -> tuple[Population, torch.Tensor]:
    arena = policy_arena(env_spec("CartPole-v1"), (16, 12))
    key = torch.tensor(index) + 100
    return Population.create(arena, initialise(arena, key)), key


def train_tickets(index: list[int], method: Method, gradient=None) -> Population:
    population, key = tickets(index)
    size = population.arena.prunable
    rows = None if gradient is None else lambda: gradient(population)
    pruner = PopulationPruner(population, method, 0.2, 24, key, gradient=rows)

    def look(_):
        before = population.parameters.mask.clone()
        updated = pruner.step(4)
        mask = population.parameters.mask
        density = method.density(pruner.count / 24, 1.0, 0.2)
        if updated or method.schedule == "constant":
            assert population.density == density
        assert (mask.sum(1) == math.floor(population.density * size + 0.5)).all()
        for name in ("weight", "m", "v"):
            row = getattr(population.parameters, name)[:, :size]
            assert not row[~mask | (mask & ~before)].any()

    ppo.train(
        SETTINGS,
        "CartPole-v1",
        population,
        key,
        evaluation=Evaluation(points=1, episodes=2, final_episodes=2),
        on_iteration=look,
    )
    assert pruner.count == 24
    return population


def towards_first(population: Population) -> torch.Tensor:
    """Some gradient that is each ticket's own."""
    size = population.arena.prunable
    return population.parameters.weight[:, :size].flip(1) + torch.arange(size)


@pytest.mark.parametrize("name", METHODS)
def test_tickets_of_a_population_are_pruned_each_by_itself(name):
    method = Method(**{**vars(METHODS[name]), "every": 8})
    gradient = towards_first if method.needs_gradient else None
    together = train_tickets([0, 1, 2], method, gradient)
    alone = train_tickets([1], method, gradient)
    assert torch.equal(together.parameters.mask[1], alone.parameters.mask[0])
    assert torch.equal(together.parameters.weight[1], alone.parameters.weight[0])
    assert not torch.equal(together.parameters.mask[0], together.parameters.mask[1])


def test_tickets_that_differ_by_layer_are_pruned_each_by_itself():
    """As magnitude pruning over all layers leaves them."""
    masks = []
    for index in ([0, 1], [0], [1]):
        population, key = tickets(index)
        size, parameters = population.arena.prunable, population.parameters
        order = parameters.weight[:, :size].abs().argsort(1, descending=True)
        parameters.mask.scatter_(1, order[:, size // 2 :], False)
        pruner = PopulationPruner(population, Method(start=0.0, every=1), 0.4, 20, key)
        for count in range(1, 21):
            pruner.step()
            assert population.density == Method(start=0.0).density(count / 20, 0.5, 0.4)
            kept = math.floor(population.density * size + 0.5)
            assert (parameters.mask.sum(1) == kept).all()
        masks.append(parameters.mask)
    assert torch.equal(masks[0], torch.cat(masks[1:]))


def test_a_critic_is_pruned_apart_by_its_own_method():
    def train_them(index):
        key = torch.tensor(index) + 100
        arena = policy_arena(env_spec("CartPole-v1"), (16, 12), prune_critic=True)
        population = Population.create(arena, initialise(arena, key))
        inner = sum(out * inp for _, out, inp in arena.prunable_layers()[:3])
        grown = Method("constant", grow="gradient", start=0.0, every=4)
        asked, masks = [], []

        def gradient():
            asked.append(pruner.count)
            return towards_first(population)

        pruner = PopulationPruner(
            population, "static", 0.1, 24, key, gradient=gradient, critic=Pruning(grown, 0.5)
        )
        for _ in range(24):
            masks.append(population.parameters.mask.clone())
            parameters, size = population.parameters, arena.prunable
            kept = parameters.mask.split([inner, size - inner], 1)
            counts = [
                math.floor(d * part.shape[1] + 0.5)
                for d, part in zip((0.1, 0.5), kept, strict=True)
            ]
            assert all((part.sum(1) == n).all() for part, n in zip(kept, counts, strict=True))
            assert population.density == sum(counts) / size
            parameters.weight[:, :size] += 0.01 * parameters.mask
            pruner.step()
        assert all(torch.equal(mask[:, :inner], masks[0][:, :inner]) for mask in masks)
        assert asked == [4, 8, 12, 16, 20]
        assert not torch.equal(masks[-1][:, inner:], masks[0][:, inner:])
        return parameters

    together, alone = train_them([0, 1, 2]), train_them([1])
    assert torch.equal(together.mask[1], alone.mask[0])
    assert torch.equal(together.weight[1], alone.weight[0])
    population, key = tickets([0])
    with pytest.raises(ValueError, match="critic must be None where the arena has no critic"):
        PopulationPruner(population, "set", 0.1, 10, key, critic=Pruning("set", 0.1))


def test_a_population_that_cannot_be_pruned_alike_is_refused():
    population, key = tickets([0, 1])
    with pytest.raises(ValueError, match="gradient must be given for this method"):
        PopulationPruner(population, "rigl", 0.1, 10, key)
    with pytest.raises(ValueError, match=r"key must have shape \(2,\), got \(1,\)"):
        PopulationPruner(population, "set", 0.1, 10, key[:1])
    population.parameters.mask[0, 0] = False
    with pytest.raises(ValueError, match="as many weights in every ticket, got 279 to 280"):
        PopulationPruner(population, "set", 0.1, 10, key)
