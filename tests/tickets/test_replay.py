"""What a captured iteration relies on: counters in tensors, state that stays where it is."""

from __future__ import annotations

import pytest
import torch

from sparse_tickets.algos import bc
from sparse_tickets.algos.ppo import PPO, Iteration
from sparse_tickets.algos.replay import can_replay, can_replay_cloning
from sparse_tickets.envs import make_env
from sparse_tickets.kernels import Arena
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.population import Population, initialise

SETTINGS = PPO(steps=80, copies=2, horizon=4, epochs=1, minibatches=2)


def _population(tickets: int = 2) -> Population:
    arena = Arena.build((4, 6, 2), (4, 6, 1))
    mask = torch.ones(tickets, arena.prunable, dtype=torch.bool)
    return Population.create(arena, initialise(arena, torch.arange(tickets)), mask, 1.0)


def _train(backend: str, on_device: bool, iterations: int = 3) -> Population:
    key, population = torch.arange(2), _population()
    with use_backend(backend):
        env = make_env("CartPole-v1", 2, SETTINGS.copies, device=key.device)
        iterate = Iteration(SETTINGS, env, population, key, 0)
        if on_device:
            env.keep_clock_on_device()
            iterate.keep_count_on_device()
        for iteration in range(iterations):
            iterate.learning_rate.fill_(SETTINGS.learning_rate_at(iteration))
            stats = iterate()
            assert stats.entropy.shape == stats.approx_kl.shape == (2,)
    return population


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_counters_in_tensors_change_nothing(backend) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    counted, read = _train(backend, on_device=False), _train(backend, on_device=True)
    assert not torch.equal(counted.parameters.weight, _population().parameters.weight)
    assert torch.equal(counted.parameters.weight, read.parameters.weight)


def _clone(backend: str, on_device: bool, first: int = 0) -> Population:
    key, population = torch.arange(2), _population()
    generator = torch.Generator().manual_seed(0)
    dataset = bc.Dataset(
        torch.randn(3, 20, 4, generator=generator),
        torch.randn(3, 20, 2, generator=generator).log_softmax(-1),
    )
    with use_backend(backend):
        iterate = bc.Iteration(SETTINGS, population, key, dataset, torch.tensor([2, 0]), first)
        if on_device:
            iterate.keep_count_on_device()
        for iteration in range(first, 3):
            iterate.learning_rate.fill_(SETTINGS.learning_rate_at(iteration))
            iterate()
    return population


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_counters_of_cloning_in_tensors_change_nothing(backend) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    counted, read = _clone(backend, on_device=False), _clone(backend, on_device=True)
    assert not torch.equal(counted.parameters.weight, _population().parameters.weight)
    assert torch.equal(counted.parameters.weight, read.parameters.weight)
    counted, read = _clone(backend, False, first=2), _clone(backend, True, first=2)
    assert torch.equal(counted.parameters.weight, read.parameters.weight)


def test_graphs_are_for_gpus_and_can_be_switched_off(monkeypatch) -> None:
    env = make_env("CartPole-v1", 2, 2, device=torch.device("cpu"))
    assert not can_replay(env, _population())
    assert not can_replay_cloning(_population())
    monkeypatch.setenv("SPARSE_TICKETS_GRAPHS", "yes")
    with pytest.raises(ValueError, match="SPARSE_TICKETS_GRAPHS must be 0 or 1, got 'yes'"):
        can_replay(env, _population())
    with pytest.raises(ValueError, match="SPARSE_TICKETS_GRAPHS must be 0 or 1, got 'yes'"):
        can_replay_cloning(_population())
